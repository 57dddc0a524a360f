"""Decides which dtypes weights are stored in, which stands for a model, what stays as it is.

A tensor keeps the dtype that it is stored in unless the user asks for one dtype: models of the Hub
hold routers in fp32 beside bf16 weights, and a rounded router chooses other experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce

import torch

from mone_megatron.methods.rule import STATE_PREFIX

# What is read, by the names that safetensors headers have for dtypes. All else is quantised, or is
# no dtype of weights.
STORED: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# Ours and theirs: the bias that chooses experts moves by less than a bf16 step, and so may the
# state of a selection rule.
_ALWAYS_FP32 = ("router.expert_bias", "gate.e_score_correction_bias")
# Tensors that a line names; the rest are counted.
_SHOWN = 3


def written_dtype(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that a tensor is written in.

    Biases that choose experts and the state of selection rules are fp32 always.

    Args:
        name: of the tensor, ours or theirs.
        stored: the dtype it has.
        wanted: the dtype the user asks for; None keeps what is stored.
    """
    if name.endswith(_ALWAYS_FP32) or name.rpartition(".")[2].startswith(STATE_PREFIX):
        return torch.float32
    return stored if wanted is None else wanted


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Returns the narrowest dtype that holds the values of all of these (of at least one)."""
    return reduce(torch.promote_types, dtypes)


def main_dtype(elements: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Returns the dtype of most elements.

    Args:
        elements: the dtype and the number of elements of each tensor; at least one.
    """
    counts: Counter[torch.dtype] = Counter()
    for dtype, count in elements:
        counts[dtype] += count
    return counts.most_common(1)[0][0]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns how configurations spell a dtype: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def describe_dtypes(dtypes: Mapping[str, torch.dtype], main: torch.dtype) -> str:
    """Tells the dtypes of a model's tensors in one line, those that are not ``main`` by name."""
    others: dict[torch.dtype, list[str]] = {}
    for name, dtype in dtypes.items():
        if dtype is not main:
            others.setdefault(dtype, []).append(name)
    parts = [dtype_name(main)]
    for dtype, names in others.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{dtype_name(dtype)} in {', '.join(sorted(names)[:_SHOWN])}{more}")
    return "; ".join(parts)
