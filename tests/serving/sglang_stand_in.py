"""Serves exports as SGLang's Transformers backend does: sglang_stand_in.py TOKENS EXPORT...

SGLang for CPUs comes as no package, so this does what its ``srt/models/transformers.py`` does to a
model before it runs: the model is built by ``AutoModel`` from its configuration, attention goes
through a function of its own, linear layers and norms become its classes, a child named ``experts``
whose parameters all have three axes becomes its fused experts, which are called with (hidden
states, experts, weights) and keep all neurons, and the block around them becomes a subclass.

Prints JSON, a line for each export: the last hidden states of the tokens, or the error. Imports
nothing of mone_megatron, as a server would not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_OWN = "sglang"


class TransformersFusedMoE(nn.Module):
    """Computes all neurons of the experts."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = theirs.gate_up_proj, theirs.down_proj

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, **others: Any
    ) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(
            zip(self.gate_up_proj, self.down_proj, strict=True)
        ):
            token, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[token], gate_up).chunk(2, dim=-1)
            answer = F.linear(F.silu(gate) * up, down) * topk_weights[token, place].unsqueeze(-1)
            output.index_add_(0, token, answer)
        return output


class HFCompatibleLinear(nn.Linear):
    """Is a linear layer of another class."""


class HFCompatibleRMSNorm(nn.RMSNorm):
    """Is a norm of another class, over the last axis."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """Looks its layer up among instances that come with the call, as RadixAttention is."""
    assert given["forward_batch"] is not None
    assert module.layer_idx in given["attention_instances"]
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2), None


def replace(module: nn.Module) -> None:
    """Replaces what is below a module."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        new = child
        if name == "experts" and parameters and all(each.ndim == 3 for each in parameters):
            new = TransformersFusedMoE(child)
            own = type("MLPWithAllReduce", (type(module),), {})
            module.__class__ = own
        elif isinstance(child, nn.Linear):
            new = HFCompatibleLinear(*child.weight.shape[::-1], bias=child.bias is not None)
        elif type(child).__name__.endswith("RMSNorm"):
            new = HFCompatibleRMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
        else:
            replace(child)
        if new is not child:
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)


@torch.no_grad()
def answer(folder: Path, tokens: list[int]) -> list[list[float]]:
    """Returns the last hidden states."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = _OWN
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    held = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): held[name] for name in held if name != "lm_head.weight"}
    )
    replace(model)
    states: Tensor = model(
        input_ids=torch.tensor([tokens]),
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.arange(len(tokens))[None],
        return_dict=False,
        forward_batch=object(),
        attention_instances=dict.fromkeys(range(config.num_hidden_layers)),
    )[0]
    return states[0].tolist()


def main() -> None:
    """Answers for each export."""
    ALL_ATTENTION_FUNCTIONS[_OWN] = attention
    for folder in sys.argv[2:]:
        try:
            found: dict[str, Any] = {"hidden": answer(Path(folder), json.loads(sys.argv[1]))}
        except Exception as error:  # whatever refuses is what the test looks at
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
