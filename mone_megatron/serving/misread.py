"""Tells what popular programs read otherwise in an exported ``config.json``, without a word.

They are written for the published models of a class, and take for granted what those have in
common. What is listed was found in their sources: llama.cpp's graphs (``src/models``) and vLLM 0.32
(``vllm/model_executor/models``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LLAMA_CPP, VLLM = "llama.cpp", "vLLM"
# Program -> model type -> whether it makes the chosen experts' weights sum to 1 whatever
# ``norm_topk_prob`` says.
_NORMALIZES = {
    LLAMA_CPP: {"qwen3_moe": True, "mixtral": True, "qwen2_moe": False, "olmoe": False},
    VLLM: {"olmoe": False},
}
# Program -> model types whose experts it computes with SiLU whatever ``hidden_act`` says.
_SILU = {
    LLAMA_CPP: {
        "qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "qwen3", "qwen2", "llama",
        "mistral",
    },
    VLLM: {"qwen3_moe", "mixtral", "olmoe"},
}  # fmt: skip
# Program -> model type -> the epsilon of all norms whatever ``rms_norm_eps`` says.
_EPSILON = {VLLM: {"olmoe": 1e-5}}


@dataclass(frozen=True)
class Misreading:
    """Describes one key that a program passes over.

    Attributes:
        program: the program's name.
        key: the key of ``config.json``.
        value: what the model was trained with.
        taken: what the program computes with.
    """

    program: str
    key: str
    value: Any
    taken: Any

    def __str__(self) -> str:
        """Returns it in one line."""
        return (
            f"{self.program} passes over {self.key}={self.value} and computes with {self.taken}, "
            "without a word: its answers would be another model's"
        )


def misreadings(config: Mapping[str, Any]) -> list[Misreading]:
    """Returns what programs would read otherwise; empty where all of them read it as it is.

    Args:
        config: ``config.json`` of a model of a stock class; our own class is read by none of them
            without our code.
    """
    kind = config.get("model_type", "")
    normalized = kind == "mixtral" or config.get("norm_topk_prob", False)
    activation, epsilon = config.get("hidden_act", "silu"), config.get("rms_norm_eps")
    found = []
    for program, kinds in _NORMALIZES.items():
        if kinds.get(kind, normalized) != normalized:
            found.append(Misreading(program, "norm_topk_prob", normalized, kinds[kind]))
    for program, silu in _SILU.items():
        if kind in silu and activation not in ("silu", "swish"):
            found.append(Misreading(program, "hidden_act", activation, "silu"))
    for program, epsilons in _EPSILON.items():
        if kind in epsilons and epsilon != epsilons[kind]:
            found.append(Misreading(program, "rms_norm_eps", epsilon, epsilons[kind]))
    return found
