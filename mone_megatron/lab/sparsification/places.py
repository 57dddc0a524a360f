"""Finds where a transformers model has neurons to prune, and gets between its projections.

Two kinds of places: experts behind transformers' experts interface, and MLPs of three linear
modules ``gate_proj``, ``up_proj`` and ``down_proj``. Nothing of the model is changed but while a
place is attached to, and no weight ever.

Shape suffixes: N tokens, K experts of a token, T rows (N * K, sorted by expert), F neurons of one
expert, E experts, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import getattr_static
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import (
    _default_apply_gate,
    _grouped_linear,
    grouped_mm_experts_forward,
)

from mone_megatron.hf.experts_mone import (
    ExpertRows,
    NeuronSettings,
    down_norms,
    experts_modules,
    fills_places,
    is_selecting,
    settings_of,
    split_projections,
    state_of,
)
from mone_megatron.hf.guard_mone import note_selected
from mone_megatron.hf.modeling_mone import MoneMLP
from mone_megatron.lab.sparsification.plans import NEED_ACTIVATION, TARGETS
from mone_megatron.lab.sparsification.ranking import Choose, Rows

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# An expert that is a module of its own.
_LONE_EXPERT = re.compile(r"(^|\.)experts\.\d+")


# Makes weights of the router's weights, [N, K].
Weigh = Callable[[Tensor], Tensor]


class Place(Protocol):
    """Describes neurons of one layer that can be pruned.

    Attributes:
        target: ``routed``, ``shared`` or ``dense``.
        neurons: F.
        own_kept: how many of them the model itself keeps for a token.
        defines_activation: whether |a| is known.
        experts: how many there are; 1 for an MLP.
        own: the model's own selection; None where it has none.
    """

    target: str
    neurons: int
    experts: int
    own: NeuronSettings | None
    own_kept: int
    defines_activation: bool

    def attached(self, choose: Choose) -> AbstractContextManager[None]:
        """Returns a context in which ``choose`` sees all rows and says which neurons they keep."""


class _Expert:
    """Wraps an experts module for transformers' function, with ``choose`` in its gate."""

    def __init__(self, place: ExpertsPlace, rows: ExpertRows, choose: Choose) -> None:
        self._place, self._rows, self._choose = place, rows, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place.module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        experts = self._place.module
        gate_TF, up_TF = split_projections(experts, gate_up)
        hidden_TF: Tensor = experts._apply_gate(gate_up)
        own_TF = _own_mask(self._place, gate_TF, up_TF, self._column_norms, self._rows)
        activate = experts.act_fn if self._place.defines_activation else None
        rows = Rows(
            gate_TF,
            up_TF,
            hidden_TF,
            activate,
            own_TF,
            self._column_norms,
            self._down,
            self._rows,
        )
        return _keep(hidden_TF, own_TF, self._choose(rows))

    def _column_norms(self) -> Tensor:
        return down_norms(self._place.module, self._rows.expert_T)

    def _down(self, hidden_TF: Tensor) -> Tensor:
        experts, expert_T = self._place.module, self._rows.expert_T
        counts_E = torch.bincount(expert_T, minlength=len(experts.down_proj))
        bias_TH = experts.down_proj_bias[expert_T] if experts.has_bias else None
        return _grouped_linear(
            hidden_TF,
            experts.down_proj,
            counts_E.cumsum(0).to(torch.int32),
            bias=bias_TH,
            is_transposed=experts.is_transposed,
        )


def _keep(hidden_TF: Tensor, *masks: Tensor | None) -> Tensor:
    for mask_TF in masks:
        if mask_TF is not None:
            hidden_TF = hidden_TF * mask_TF
    return hidden_TF


def _own_mask(
    place: ExpertsPlace | MLPPlace,
    gate_TF: Tensor,
    up_TF: Tensor,
    down_norm: Callable[[], Tensor],
    rows: ExpertRows | None = None,
) -> Tensor | None:
    """Returns what the model itself keeps, bool ``[T, F]``; None where that is everything."""
    if place.own is None or place.own_kept >= place.neurons:
        return None
    return place.own.mask(
        gate_TF,
        up_TF,
        place.module.act_fn,
        down_norm=down_norm,
        state=state_of(place.module, place.own),
        rows=rows,
    )


class ExpertsPlace:
    """Is the place of the routed experts of a layer."""

    target = "routed"

    def __init__(self, module: nn.Module, block: nn.Module) -> None:
        """Checks that an experts module can be pruned.

        Args:
            module: the experts.
            block: what holds them and their router.

        Raises:
            ValueError: it has no gate projection.
        """
        self.module = cast(Any, module)
        self.block = block
        if not self.module.has_gate:
            raise ValueError(f"{type(module).__name__} has no gate projection to rank neurons by")
        if fills_places(module):
            raise ValueError(
                "model.router.kind: this model's router gives tokens different numbers of experts, "
                "which is not written for pruning"
            )
        self.neurons = int(self.module.down_proj.shape[1 if self.module.is_transposed else 2])
        self.defines_activation = getattr_static(type(module), "_apply_gate") is _default_apply_gate
        self.own: NeuronSettings | None = None
        if is_selecting(self.module):
            self.own = settings_of(self.module)
        self.own_kept = self.own.kept(self.neurons) if self.own else self.neurons
        self.experts = len(self.module.down_proj)

    @contextmanager
    def attached(self, choose: Choose, weigh: Weigh | None = None) -> Iterator[None]:
        """Attaches ``choose`` as :class:`Place` says.

        The experts are computed by grouped matrix products, with the weights that ``weigh`` makes
        of the router's.
        """

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            note_selected(self.module)
            if weigh is not None:
                top_k_weights = weigh(top_k_weights)
            rows = ExpertRows.of(top_k_index, top_k_weights, by_expert=True)
            expert = cast(nn.Module, _Expert(self, rows, choose))
            return grouped_mm_experts_forward(expert, hidden_states, top_k_index, top_k_weights)

        # An attribute of the object, before the method of its class.
        self.module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del self.module.__dict__["forward"]

    @contextmanager
    def without(self, gone: Collection[int]) -> Iterator[None]:
        """Makes the router choose among the other experts while the context lasts.

        Raises:
            ValueError: the layer has no router of linear logits.
        """
        router = self._router()
        before = router.__dict__.get("forward")
        forward = router.forward

        def masked(*arguments: Any, **named: Any) -> Any:
            with _WithoutLogits(gone, self.experts):
                return forward(*arguments, **named)

        router.__dict__["forward"] = masked
        try:
            yield
        finally:
            if before is None:
                del router.__dict__["forward"]
            else:
                router.__dict__["forward"] = before

    def _router(self) -> nn.Module:
        for module in self.block.children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == self.experts:
                return module
        raise ValueError(
            f"{type(self.block).__name__} has no router with a row of weights for each expert, so "
            "none can be taken out of it"
        )


class _WithoutLogits(TorchFunctionMode):
    """Makes linear functions that have an output for each expert give -inf for some of them."""

    def __init__(self, gone: Collection[int], experts: int) -> None:
        super().__init__()
        self._gone, self._experts = sorted(gone), experts

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and output.shape[-1] == self._experts:
            output[..., self._gone] = -torch.inf
        return output


class MLPPlace:
    """Is the place of a dense MLP or a shared expert, with hooks on its three projections."""

    defines_activation = True
    experts = 1

    def __init__(self, module: nn.Module, target: str) -> None:
        self.module = cast(Any, module)
        self.target = target
        self.neurons = int(self.module.down_proj.in_features)
        self.own: NeuronSettings | None = None
        if isinstance(module, MoneMLP):
            self.own = module.neurons
        self.own_kept = self.own.kept(self.neurons) if self.own else self.neurons

    @contextmanager
    def attached(self, choose: Choose) -> Iterator[None]:
        """Attaches ``choose`` as :class:`Place` says.

        Raises:
            ValueError: when it is called, the down projection's input is not a * u.
        """
        seen: dict[str, Tensor] = {}
        checked = False

        def remember(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, inputs, output: seen.__setitem__(name, output)

        def prune(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal checked
            gate_TF, up_TF = (seen.pop(name).flatten(0, -2) for name in _PROJECTIONS[:2])
            activate = self.module.act_fn
            if getattr(self.module, "rectified_up", False):
                up_TF = up_TF.relu()
            hidden_TF = activate(gate_TF) * up_TF
            own_TF = _own_mask(self, gate_TF, up_TF, self._column_norms)
            (given,) = inputs
            if not checked:
                self._check(given, _keep(hidden_TF, own_TF))
                checked = True
            rows = Rows(
                gate_TF,
                up_TF,
                hidden_TF,
                activate,
                own_TF,
                self._column_norms,
                # Not called as a module: its hook is this function.
                self.module.down_proj.forward,
            )
            return (_keep(given, _as(given, choose(rows))),)

        handles = [
            getattr(self.module, name).register_forward_hook(remember(name))
            for name in _PROJECTIONS[:2]
        ]
        handles.append(self.module.down_proj.register_forward_pre_hook(prune))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, given: Tensor, expected_TF: Tensor) -> None:
        if not torch.allclose(
            given.flatten(0, -2).float(), expected_TF.float(), rtol=1e-2, atol=1e-6, equal_nan=True
        ):
            raise ValueError(
                f"{type(self.module).__name__} computes something other than act_fn(gate_proj) * "
                "up_proj; its neurons cannot be pruned"
            )

    def _column_norms(self) -> Tensor:
        weight_HF = self.module.down_proj.weight
        return torch.linalg.vector_norm(weight_HF, dim=0, keepdim=True, dtype=torch.float32)


def _as(given: Tensor, mask_TF: Tensor | None) -> Tensor | None:
    return None if mask_TF is None else mask_TF.view(given.shape)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder layers of a model.

    Raises:
        ValueError: it has none under the usual name.
    """
    layers = dict(model.get_decoder().named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no decoder layers of the usual kind, so no experts and no "
            "MLP of gate, up and down projections can be found in it"
        )
    return layers


def choose_targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the kinds of places to prune: ``wanted``, or the routed experts, or the dense MLPs.

    Raises:
        ValueError: the model has none of a wanted kind, or no place at all.
    """
    found = {place.target for layer in decoder_layers(model) for place in _in_layer(layer)}
    name = type(model).__name__
    if not found:
        raise ValueError(
            f"{name} has no experts behind transformers' experts interface and no MLP of linear "
            "modules gate_proj, up_proj and down_proj"
        )
    if wanted is None:
        return ("routed",) if "routed" in found else ("dense",)
    for target in wanted:
        if target not in found:
            raise ValueError(
                f"--apply-to (or --experts-only): {name} has no {target} neurons, only "
                f"{', '.join(kind for kind in TARGETS if kind in found)}"
            )
    return tuple(target for target in TARGETS if target in wanted)


def places_of(layer: nn.Module, targets: Iterable[str]) -> list[Place]:
    """Returns the places of one decoder layer of these kinds, in the order of its modules."""
    return [place for place in _in_layer(layer) if place.target in targets]


def _in_layer(layer: nn.Module) -> Iterator[Place]:
    modules = dict(layer.named_modules())
    experts = experts_modules(cast(PreTrainedModel, layer))
    for name, module in modules.items():
        if module in experts:
            yield ExpertsPlace(module, modules[name.rpartition(".")[0]])
        elif _is_gated_mlp(module):
            if _LONE_EXPERT.search(name):
                raise ValueError(
                    f"{type(layer).__name__}: its experts are modules of their own, not behind "
                    "transformers' experts interface"
                )
            yield MLPPlace(module, "shared" if experts else "dense")


def _is_gated_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    linear = all(isinstance(children.get(name), nn.Linear) for name in _PROJECTIONS)
    return linear and "act_fn" in children


def check_definable(places: Iterable[Place], scores: Iterable[str]) -> None:
    """Checks that every score is defined at every place.

    Raises:
        ValueError: |a| is asked of experts that compute their gate in a way of their own.
    """
    if all(place.defines_activation for place in places):
        return
    for score in scores:
        if score in NEED_ACTIVATION:
            raise ValueError(
                f"--scores: {score} needs |a|, and these experts compute their gate in a way of "
                "their own; use abs_gate, signed_gate, abs_product, wina or random"
            )


def compute_all_neurons(model: PreTrainedModel) -> None:
    """Makes a model that selects neurons compute all of them; its weights stay."""
    for module in model.modules():
        if isinstance(module, MoneMLP):
            module.neurons = None
    if any(isinstance(place, ExpertsPlace) and place.own for place in all_places(model)):
        model.set_experts_implementation("grouped_mm")


def all_places(model: PreTrainedModel) -> Iterator[Place]:
    """Yields every place of every layer."""
    for layer in decoder_layers(model):
        yield from _in_layer(layer)
