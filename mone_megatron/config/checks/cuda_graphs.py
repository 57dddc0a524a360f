"""Checks CUDA graphs of attention against what a graph would leave out without a word.

A graph repeats what the GPU was given once, on the same memory: what Python decides in a layer, and
what a layer gets beside its hidden states and RoPE, is that of the capture for ever. The layers'
other halves, norms before an MLP, routers, experts and dense MLPs, run without
(:mod:`mone_megatron.parallel.cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mone_megatron.config.megatron import GRAPHS, graphs_attention
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config

_KEY = f"megatron.transformer.{GRAPHS}"


@dataclass(frozen=True)
class Refusal:
    """Describes one thing that graphs of attention cannot be made with.

    Attributes:
        key: of the configuration.
        found: returns the value that is in the way; None where nothing is.
        why: what a graph would do to it.
        fix: what to use instead.
    """

    key: str
    found: Callable[[Config, Resources], object]
    why: str
    fix: str


def _unless(value: object, harmless: object) -> object:
    """Returns a value that is in the way; None for the one that is not."""
    return None if value == harmless else value


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "device.kind",
        lambda config, resources: "cpu" if resources.is_cpu(config.device) else None,
        "graphs are of CUDA",
        "cuda",
    ),
    Refusal(
        "device.dtype",
        lambda config, _: config.device.dtype if config.device.dtype == "fp32" else None,
        "megatron-core makes the graphs' inputs in bf16, and fp32 would be rounded to it",
        "bf16",
    ),
    Refusal(
        "model.attention_dropout",
        lambda config, _: _unless(config.model.attention_dropout, 0),
        "what a graph draws was not tried",
        "0",
    ),
    Refusal(
        "model.hidden_dropout",
        lambda config, _: _unless(config.model.hidden_dropout, 0),
        "what a graph draws was not tried",
        "0",
    ),
    Refusal(
        "data.reset_attention",
        lambda config, _: _unless(config.data.reset_attention, False),
        "a graph would keep the documents that it was captured with",
        "false",
    ),
    Refusal(
        "train.recompute",
        lambda config, _: _unless(config.train.recompute, "none"),
        "what is recomputed would be within a graph, or around one",
        "none",
    ),
    Refusal(
        "parallel.pipeline",
        lambda config, _: _unless(config.parallel.pipeline, 1),
        "graphs of several microbatches share memory, of which some is being sent to the next "
        "stage; that was not tried",
        "1",
    ),
    Refusal(
        "parallel.context",
        lambda config, _: _unless(config.parallel.context, 1),
        "keys and values are exchanged on streams of their own, which was not tried in a graph",
        "1",
    ),
    Refusal(
        "model.mtp.depth",
        lambda config, _: _unless(config.model.mtp.depth, 0),
        "releases of megatron-core call its layers differently, which was not tried in a graph",
        "0",
    ),
)


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields what graphs of attention cannot be made with, where they are asked for."""
    given = config.megatron.transformer
    impl = given.get(GRAPHS)
    if impl in ("local", "full_iteration"):
        yield (
            f"{_KEY}: {impl} graphs evaluation, too, and more of a step than attention; use "
            "transformer_engine, or leave it out"
        )
    if not graphs_attention(config.megatron):
        return
    if not resources.is_cpu(config.device) and not resources.have_transformer_engine():
        yield f"{_KEY}: Transformer Engine makes the graphs, and is not installed; leave it out"
    warm_up = given.get("cuda_graph_warmup_steps", 1)
    if isinstance(warm_up, int) and warm_up < 1:
        yield (
            f"megatron.transformer.cuda_graph_warmup_steps: {warm_up}: the first step is taken "
            "without graphs; use 1 or more"
        )
    for one in REFUSALS:
        value = one.found(config, resources)
        if value is not None:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield (
                f"{one.key}: {shown} with {_KEY}={impl}: {one.why}; use {one.fix}, or leave the "
                "graphs out"
            )
    for name in given:
        # The fields of experts and routers are read outside of the graphs.
        if not name.startswith(("moe_", "cuda_graph_")):
            yield (
                f"megatron.transformer.{name}: it was not tried with {_KEY}={impl}, where a graph "
                "might leave it out; leave one of the two out"
            )
