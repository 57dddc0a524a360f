"""Records a routing trace from any transformers MoE behind the library's experts interface.

The experts are computed by transformers' own grouped matrix products, and the neurons are read
between them: what is recorded is what the model did, not computed a second time.

Shape suffixes: N tokens, K experts of a token, R = N K rows, F neurons of an expert, B bytes of
their bits; B and S of ``ids_BS`` are windows and positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from mone_megatron.hf.experts_mone import (
    ExpertRows,
    ExpertsModule,
    NeuronSettings,
    down_norms,
    experts_modules,
    fills_places,
    has_own_gate,
    selects,
    settings_of,
    split_projections,
    state_of,
)
from mone_megatron.hf.guard_mone import note_selected
from mone_megatron.kernels.packed import pack_bits
from mone_megatron.lab.routing.trace import (
    LayerShape,
    Routing,
    Selection,
    Tokens,
    TraceWriter,
)
from mone_megatron.methods.scores import SCORES

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Batch:
    """Holds windows of one length and one domain.

    Attributes:
        ids_BS: int64 token ids.
        domain: number of the domain.
    """

    ids_BS: npt.NDArray[np.int64]
    domain: int

    def tokens(self, first_window: int) -> Tokens:
        """Returns the tokens as a shard has them, with windows counted from ``first_window``."""
        count, length = self.ids_BS.shape
        numbers = np.arange(first_window, first_window + count, dtype=np.int32)
        domain_N = np.full(count * length, self.domain, dtype=np.int32)
        ids_N = self.ids_BS.reshape(-1).astype(np.int32)
        return Tokens(ids_N, np.repeat(numbers, length), domain_N)


@dataclass(frozen=True)
class Recorded:
    """Holds what a trace's header says of a recording: its layers and how neurons were chosen."""

    layers: tuple[LayerShape, ...]
    selection: Selection | None


class _Watched:
    """Wraps an experts module for transformers' function; its gate tells which neurons it keeps."""

    def __init__(
        self,
        experts: ExpertsModule,
        watched: NeuronSettings,
        selects: bool,
        rows: ExpertRows,
    ) -> None:
        self._experts, self._watched, self._selects = experts, watched, selects
        self._rows = rows
        own = has_own_gate(experts)
        if own and watched.reads_activation:
            defined = [score.name for score in SCORES if "activation" not in score.reads]
            raise ValueError(
                f"--score: {type(experts).__name__} computes its gate in a way of its own, so |a| "
                f"is not defined; use one of {', '.join(defined)}"
            )
        self._own_gate = own
        self.kept_RB: Tensor | None = None
        self.neurons = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate_RF, up_RF = split_projections(self._experts, gate_up)
        hidden_RF: Tensor = self._experts._apply_gate(gate_up)
        watched, own = self._watched, self._own_gate
        mask_RF = watched.mask(
            gate_RF,
            up_RF,
            None if own else self._experts.act_fn,
            product_TF=hidden_RF if own else None,
            down_norm=partial(down_norms, self._experts, self._rows.expert_T),
            state=state_of(self._experts, watched),
            rows=self._rows,
        )
        self.kept_RB, self.neurons = pack_bits(mask_RF), int(mask_RF.shape[-1])
        return hidden_RF * mask_RF if self._selects else hidden_RF


class _Layer:
    """Watches the experts of one layer."""

    def __init__(self, number: int, experts: nn.Module, otherwise: NeuronSettings) -> None:
        self.number = number
        self.experts = cast(ExpertsModule, experts)
        if fills_places(experts):
            raise ValueError(
                "model.router.kind: this model's router gives tokens different numbers of experts, "
                "which a trace of as many for each token cannot hold"
            )
        self.selects = selects(self.experts)
        self.settings = settings_of(self.experts) if self.selects else otherwise
        self.routing: Routing | None = None
        # Of the last forward pass.
        self.finite = True
        # Known after the first forward pass; no neurons without a gate.
        self.top_k = self.neurons = 0

    def shape(self) -> LayerShape:
        """Returns the layer as the header describes it; known after the first forward pass."""
        kept = self.settings.kept(self.neurons) if self.neurons else 0
        return LayerShape(self.number, self.experts.num_experts, self.top_k, self.neurons, kept)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes the experts and remembers what the tokens used."""
        note_selected(cast(nn.Module, self.experts))
        seen: Any = self.experts
        if self.experts.has_gate:
            rows = ExpertRows.of(top_k_index, top_k_weights, by_expert=True)
            seen = _Watched(self.experts, self.settings, self.selects, rows)
        output = grouped_mm_experts_forward(seen, hidden_states, top_k_index, top_k_weights)
        kept_NKB = None
        if seen is not self.experts:
            assert seen.kept_RB is not None
            self.neurons = seen.neurons
            # The same call on the same numbers as the function's own: its order of rows.
            _, order_R = torch.sort(top_k_index.reshape(-1))
            kept_RB = torch.empty_like(seen.kept_RB)
            kept_RB[order_R] = seen.kept_RB
            kept_NKB = kept_RB.unflatten(0, top_k_index.shape)
        # Routers may give the experts of a token in any order.
        by_weight_NK = top_k_weights.argsort(dim=-1, descending=True, stable=True)
        experts_NK = top_k_index.gather(-1, by_weight_NK)
        weights_NK = top_k_weights.gather(-1, by_weight_NK).float()
        if kept_NKB is not None:
            index = by_weight_NK.unsqueeze(-1).expand_as(kept_NKB)
            kept_NKB = kept_NKB.gather(1, index)
        self.top_k = int(top_k_index.shape[-1])
        self.finite = bool(output.isfinite().all())
        self.routing = Routing(
            experts_NK.int().cpu().numpy(),
            weights_NK.cpu().numpy(),
            None if kept_NKB is None else kept_NKB.cpu().numpy(),
        )
        return output


def _numbered(model: PreTrainedModel, name: str) -> list[tuple[int, nn.Module]]:
    """Returns the experts module of each layer with the layer's number, from 1."""
    wanted = set(map(id, experts_modules(model)))
    named = [(path, module) for path, module in model.named_modules() if id(module) in wanted]
    if not named:
        raise ValueError(
            f"{name}: {type(model).__name__} has no experts behind transformers' experts "
            "interface; a dense model has no routing to analyse, and experts of other code cannot "
            "be read"
        )
    found = [_LAYER.search(path) for path, _ in named]
    numbers = [int(match.group(1)) + 1 if match else 0 for match in found]
    if 0 in numbers or len(set(numbers)) < len(numbers):
        # Names that do not tell: counted, in the order of the model.
        numbers = list(range(1, len(named) + 1))
    return [(number, module) for number, (_, module) in zip(numbers, named, strict=True)]


@contextmanager
def _watching(
    model: PreTrainedModel, otherwise: NeuronSettings, name: str
) -> Iterator[list[_Layer]]:
    layers = [_Layer(number, module, otherwise) for number, module in _numbered(model, name)]
    modules = [cast(nn.Module, layer.experts) for layer in layers]
    for module, layer in zip(modules, layers, strict=True):
        # On the object, in front of its class's.
        module.forward = layer.forward
    try:
        yield layers
    finally:
        for module in modules:
            del module.forward


@torch.no_grad()
def record(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    writer: TraceWriter,
    *,
    keep_ratio: float,
    score: str = "abs_activation",
    progress: Callable[[int], None] = lambda tokens: None,
    name: str = "the model",
) -> Recorded:
    """Runs a model on windows of text and writes what its experts did.

    Args:
        model: on its device, in evaluation mode.
        batches: each becomes a shard.
        writer: takes the shards; the caller closes it.
        keep_ratio: the share of neurons to record in experts that do not select themselves.
        score: what ranks those.
        progress: told how many tokens were done with each batch.
        name: what errors call the model.

    Raises:
        ValueError: a dense model, a setting that does not fit it, or experts whose output is not
            finite: whatever they chose means nothing.
    """
    windows = 0
    with _watching(model, NeuronSettings(keep_ratio, score), name) as layers:
        for batch in batches:
            ids_BS = torch.from_numpy(batch.ids_BS).to(model.device)
            # Without the head: routing needs no logits.
            model.base_model(input_ids=ids_BS, use_cache=False)
            routings = {}
            for layer in layers:
                assert layer.routing is not None, f"layer {layer.number} did not run"
                if not layer.finite:
                    raise ValueError(
                        f"{name}: layer {layer.number}: the experts' output is not finite: the "
                        "weights are damaged, or --dtype is too narrow for them"
                    )
                routings[layer.number], layer.routing = layer.routing, None
            writer.add(batch.tokens(windows), routings)
            windows += len(batch.ids_BS)
            progress(batch.ids_BS.size)
        shapes = tuple(sorted((layer.shape() for layer in layers), key=lambda one: one.layer))
        return Recorded(shapes, _selection(layers))


def _selection(layers: list[_Layer]) -> Selection | None:
    gated = [layer for layer in layers if layer.experts.has_gate]
    if not gated:
        return None
    first = gated[0]
    by = "model" if first.selects else "analysis"
    return Selection(first.settings.keep_ratio, first.settings.score, by)
