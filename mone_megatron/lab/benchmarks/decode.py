"""Times a decoding step of a layer's experts: rows of kept neurons beside all rows.

The dense side is the fastest of three, each time: transformers' grouped and batched matrix
products, and on CPU a loop over the chosen experts, which copies nothing. It needs the ``hf``
extra.

Shape suffixes: N tokens, K experts of a token, E experts, F neurons of an expert, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.decode_mone import mone_sparse_experts_forward
from mone_megatron.hf.experts_mone import NeuronSettings, mone_experts_forward
from mone_megatron.hf.modeling_mone import MoneExperts
from mone_megatron.kernels.decode import linear_by_blocks, speed_limit
from mone_megatron.lab.benchmarks.layer import LayerShape
from mone_megatron.lab.benchmarks.measure import Spread, finished, graphed, interleave, ratio

# Steps over different tokens and experts, so that no step finds its weights in a cache.
_DIFFERENT_STEPS = 16
OURS, MASKED = "mone_sparse", "mone (mask)"


@dataclass(frozen=True)
class DecodeCost:
    """Holds what decoding a number of tokens at a keep ratio costs."""

    tokens: int
    keep_ratio: float
    ours_milliseconds: Spread
    # The fastest way to compute all neurons, and its time over ours.
    dense: str
    speed_up: Spread
    speed_up_processor: Spread
    # By bytes read (kernels/decode.py), and the share of it that was reached: the median's.
    limit: float
    share_of_limit: float
    # Milliseconds of every way, medians.
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class DecodeResult:
    """Holds the costs of all numbers of tokens and keep ratios."""

    shape: dict[str, int]
    dtype: str
    cells: list[DecodeCost]


def _experts(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> MoneExperts:
    config = MoneConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.neurons,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        mone=NeuronSettings(0.25).to_config(),
    )
    with torch.device("meta"):
        experts = MoneExperts(config)
    experts = experts.to(dtype).to_empty(device=device)
    with torch.no_grad():
        experts.gate_up_proj.normal_(0.0, shape.hidden**-0.5)
        experts.down_proj.normal_(0.0, shape.neurons**-0.5)
    return experts


def _loop(experts: nn.Module, tokens_NH: Tensor, index_NK: Tensor, probs_NK: Tensor) -> Tensor:
    """Computes expert after expert, weights in their place, on all threads: a good CPU engine."""
    output_NH = torch.zeros_like(tokens_NH)
    gate_up, down = cast(Any, experts).gate_up_proj, cast(Any, experts).down_proj
    for expert in index_NK.unique().tolist():
        token, place = (index_NK == expert).nonzero(as_tuple=True)
        gate, up = linear_by_blocks(tokens_NH[token], gate_up[expert]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * probs_NK[token, place].unsqueeze(-1)
        output_NH.index_add_(0, token, linear_by_blocks(hidden, down[expert]))
    return output_NH


Step = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _rotating(
    step: Step, layers: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Callable[[], object]:
    """Returns a step for the next layer and the next tokens at each call.

    On a GPU each pair is a CUDA graph.
    """
    device = inputs[0][0].device
    actions = [
        graphed(partial(step, layer, *each), device)
        for layer, each in zip(itertools.cycle(layers), inputs, strict=False)
    ]
    following = itertools.cycle(actions)
    return lambda: next(following)()


@torch.no_grad()
def measure_decode(
    shape: LayerShape,
    tokens: Sequence[int],
    keep_ratios: Sequence[float],
    *,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> DecodeResult:
    """Times one step of the experts for each number of tokens and keep ratio, interleaved.

    Each way reads two layers' weights in turn, for other tokens and experts every time.

    Args:
        shape: of the layer; its tokens are not used.
        tokens: numbers of tokens that are decoded at a time.
        keep_ratios: shares of the neurons that a token keeps.
        repeats: measurements of each.
        device: where.
        dtype: of weights and tokens.

    Raises:
        ValueError: for a ratio outside (0, 1) or no tokens.
    """
    if min(tokens) < 1 or not all(0 < keep_ratio < 1 for keep_ratio in keep_ratios):
        raise ValueError("--batch must be 1 or more, --keep-ratio in (0, 1)")
    # The rows of neurons have to lie together for ours only: layers of its own.
    dense, ours = ([_experts(shape, dtype, device) for _ in range(2)] for _ in range(2))
    cells = []
    for count in tokens:
        inputs = [_inputs(shape, count, dtype, device) for _ in range(_DIFFERENT_STEPS)]
        for keep_ratio in keep_ratios:
            for layer in (*dense, *ours):
                cast(Any, layer.config).mone = NeuronSettings(keep_ratio).to_config()
            cells.append(_cell(shape, dense, ours, inputs, keep_ratio, repeats))
    sizes = {
        "hidden": shape.hidden, "neurons": shape.neurons, "experts": shape.experts,
        "chosen": shape.chosen,
    }  # fmt: skip
    return DecodeResult(sizes, str(dtype), cells)


def _inputs(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    tokens_NH = torch.randn(tokens, shape.hidden, dtype=dtype, device=device)
    index_NK = torch.rand(tokens, shape.experts, device=device).topk(shape.chosen, dim=-1).indices
    return tokens_NH, index_NK, torch.rand(tokens, shape.chosen, dtype=dtype, device=device)


def _cell(
    shape: LayerShape,
    dense: Sequence[nn.Module],
    ours: Sequence[nn.Module],
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    keep_ratio: float,
    repeats: int,
) -> DecodeCost:
    device = inputs[0][0].device
    dense_ways: dict[str, Step] = {
        "grouped_mm": grouped_mm_experts_forward,
        "batched_mm": batched_mm_experts_forward,
    }
    if device.type == "cpu":
        dense_ways["loop"] = _loop
    ways = dense_ways | {MASKED: mone_experts_forward}
    calls = 20 if device.type == "cuda" else 1
    actions = {
        name: finished(_rotating(step, dense, inputs), device, calls=calls)
        for name, step in ways.items()
    }
    actions[OURS] = finished(
        _rotating(mone_sparse_experts_forward, ours, inputs), device, calls=calls
    )
    samples = interleave(actions, repeats=repeats, warmup=2)
    medians = {
        name: 1e3 * Spread.of(seconds).median / calls for name, seconds in samples.clock.items()
    }
    fastest = min(dense_ways, key=lambda name: medians[name])
    speed_up = ratio(samples.clock, fastest, OURS)
    tokens = len(inputs[0][0])
    limit = speed_limit(tokens, experts=shape.experts, chosen=shape.chosen, keep_ratio=keep_ratio)
    return DecodeCost(
        tokens=tokens,
        keep_ratio=keep_ratio,
        ours_milliseconds=Spread.of([1e3 * once / calls for once in samples.clock[OURS]]),
        dense=fastest,
        speed_up=speed_up,
        speed_up_processor=ratio(samples.processor, fastest, OURS),
        limit=limit,
        share_of_limit=speed_up.median / limit,
        milliseconds=medians,
    )
