"""Neuron selection in the routed experts of any transformers MoE behind its experts interface.

transformers computes experts through a function that it looks up by name; ``mone`` is one: the
library's own grouped matrix products with the selection between them, on weights in their native
layout. It reads its settings from the model's configuration (``config.mone``), so

    enable_mone(model, keep_ratio=0.25)

makes MoNE of any such model, and ``model.set_experts_implementation("grouped_mm")`` undoes it.

This file is copied into exported models: of ours it imports the definition of the selection only.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, N tokens,
K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from inspect import getattr_static
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from mone_megatron.kernels.reference import neuron_scores, topk_mask

# The experts implementations that select: on grouped and on batched matrix products.
MONE, MONE_BATCHED = "mone", "mone_batched_mm"
SCORES = ("abs_activation", "abs_gate", "signed_gate", "abs_product")
TARGETS = ("routed", "shared", "dense")

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class ExpertsModule(Protocol):
    """What transformers' interface makes of a model's experts."""

    config: Any
    has_gate: bool
    is_concatenated: bool
    num_experts: int
    intermediate_dim: int
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]
    _is_expert_parallel: bool

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


def experts_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The experts of a model that are behind the interface, one a layer."""
    # Set by the library's decorator on every module that honours it.
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


@dataclass(frozen=True)
class NeuronSettings:
    """``config.mone``: which neurons a token keeps, and in which MLPs."""

    keep_ratio: float
    score: str = "abs_activation"
    apply_to: tuple[str, ...] = ("routed",)

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: naming the setting.
        """
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"mone.keep_ratio: {self.keep_ratio} is not in (0, 1]")
        if self.score not in SCORES:
            raise ValueError(f"mone.score: {self.score!r} is not one of {', '.join(SCORES)}")
        if unknown := set(self.apply_to) - set(TARGETS):
            raise ValueError(
                f"mone.apply_to: {sorted(unknown)[0]!r} is not one of {', '.join(TARGETS)}"
            )

    @classmethod
    def from_config(cls, settings: dict[str, Any]) -> NeuronSettings:
        """From ``config.mone`` as JSON gives it."""
        try:
            return cls(**settings | {"apply_to": tuple(settings.get("apply_to", ("routed",)))})
        except TypeError as error:
            raise ValueError(f"config.mone: {settings} is not understood ({error})") from None

    def to_config(self) -> dict[str, Any]:
        """For ``config.mone``."""
        return asdict(self) | {"apply_to": list(self.apply_to)}

    def kept(self, neurons: int) -> int:
        """K of ``neurons``.

        Raises:
            ValueError: when that is none.
        """
        kept = round(self.keep_ratio * neurons)
        if kept < 1:
            raise ValueError(f"mone.keep_ratio: {self.keep_ratio} of {neurons} neurons keeps none")
        return kept

    def mask(self, gate_TF: Tensor, up_TF: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        """True at the neurons that each row keeps; see :mod:`mone_megatron.kernels.reference`."""
        scores_TF = neuron_scores(gate_TF, up_TF, self.score, activate)  # type: ignore[arg-type]
        return topk_mask(scores_TF.detach(), self.kept(gate_TF.shape[-1]))

    def select(
        self, gate_TF: Tensor, up_TF: Tensor, activate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``a * u`` at the kept neurons and zero at the others: the down projection's input."""
        hidden_TF = activate(gate_TF) * up_TF
        if self.kept(gate_TF.shape[-1]) == gate_TF.shape[-1]:
            return hidden_TF
        return hidden_TF * self.mask(gate_TF, up_TF, activate)


def selects(experts: ExpertsModule) -> bool:
    """Whether ``config.mone`` holds settings of the selection."""
    return bool(getattr(experts.config, "mone", None))


def settings_of(experts: ExpertsModule) -> NeuronSettings:
    """What ``config.mone`` says for these experts.

    Raises:
        ValueError: when it is not set, or the experts have no gate to select by.
    """
    if not selects(experts):
        raise ValueError(
            "config.mone is not set: call mone_megatron.hf.enable_mone(model, keep_ratio=...)"
        )
    if not experts.has_gate:
        raise ValueError(f"{type(experts).__name__} has no gate projection to select by")
    return NeuronSettings.from_config(experts.config.mone)


def has_own_gate(experts: ExpertsModule) -> bool:
    """Whether it computes something else than ``act_fn(gate) * up``."""
    return getattr_static(type(experts), "_apply_gate") is not _default_apply_gate


class _Selecting:
    """An experts module as transformers' functions see it, with a gate that selects."""

    def __init__(self, experts: ExpertsModule) -> None:
        self._experts = experts
        self._settings = settings_of(experts)
        self._own_gate = has_own_gate(experts)
        if self._own_gate and self._settings.score == "abs_activation":
            raise ValueError(
                f"{type(experts).__name__} computes its gate in a way of its own, so |a| is not "
                "defined: use score abs_gate, signed_gate or abs_product"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._experts.is_concatenated:
            gate_TF, up_TF = gate_up.chunk(2, dim=-1)
        else:
            gate_TF, up_TF = gate_up[..., ::2], gate_up[..., 1::2]
        settings = self._settings
        if not self._own_gate:
            return settings.select(gate_TF, up_TF, self._experts.act_fn)
        hidden_TF: Tensor = self._experts._apply_gate(gate_up)
        if settings.score == "abs_product":
            scores_TF = hidden_TF.detach().abs()
            return hidden_TF * topk_mask(scores_TF, settings.kept(hidden_TF.shape[-1]))
        return hidden_TF * settings.mask(gate_TF, up_TF, self._experts.act_fn)


def _through(forward: ExpertsForward) -> ExpertsForward:
    def selecting_forward(
        self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """``[N, h]``, ``[N, K]`` expert numbers and ``[N, K]`` weights to ``[N, h]``."""
        selecting = cast(nn.Module, _Selecting(cast(ExpertsModule, self)))
        return forward(selecting, hidden_states, top_k_index, top_k_weights)

    return selecting_forward


mone_experts_forward = _through(grouped_mm_experts_forward)
mone_batched_mm_experts_forward = _through(batched_mm_experts_forward)


def register_experts() -> None:
    """Make ``mone`` and ``mone_batched_mm`` known to transformers; again is fine."""
    ALL_EXPERTS_FUNCTIONS.register(MONE, mone_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register(MONE_BATCHED, mone_batched_mm_experts_forward)


def enable_mone(
    model: PreTrainedModel,
    *,
    keep_ratio: float,
    score: str = "abs_activation",
    apply_to: Sequence[str] = ("routed",),
) -> None:
    """Let a transformers MoE select neurons in its routed experts, without touching its weights.

    The settings go into the configuration and are saved with the model. Shared experts and dense
    layers select only in our own model class (:mod:`.modeling_mone`), which reads the same
    settings.

    Raises:
        ValueError: for settings that are wrong, or a model without experts behind the interface.
    """
    settings = NeuronSettings(keep_ratio, score, tuple(apply_to))
    modules = [cast(ExpertsModule, module) for module in experts_modules(model)]
    if not modules and "routed" in settings.apply_to:
        raise ValueError(
            f"{type(model).__name__} has no experts behind transformers' experts interface"
        )
    configs = [model.config, *(module.config for module in modules)]
    for config in configs:
        config.mone = settings.to_config()
    model.set_experts_implementation(MONE)
