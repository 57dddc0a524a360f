"""Selects neurons in the routed experts of any transformers MoE behind its experts interface.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from inspect import getattr_static
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    _grouped_linear,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.utils import logging

from mone_megatron.hf.guard_mone import guard, note_selected, watch
from mone_megatron.hf.parallel_mone import Neurons
from mone_megatron.methods.rule import STATE_PREFIX, Rows, count_kept
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES

logger = logging.get_logger(__name__)

# The experts implementations that select: on grouped and on batched matrix products.
MONE, MONE_BATCHED = "mone", "mone_batched_mm"
TARGETS = ("routed", "shared", "dense")

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class ExpertsModule(Protocol):
    """Describes what transformers' interface makes of a model's experts."""

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
    """Returns the experts of a model that are behind the interface, one module a layer."""
    # Set by the library's decorator on every module that honours it.
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


@dataclass(frozen=True)
class ExpertRows:
    """Says what the rows of experts are of, a token once for each of its experts.

    Attributes:
        expert_T: int64, the expert of each row.
        token_T: int64, the token of each row.
        weight_T: the router's weight of each row.
    """

    expert_T: Tensor
    token_T: Tensor
    weight_T: Tensor

    @classmethod
    def of(cls, index_NK: Tensor, weights_NK: Tensor, *, by_expert: bool) -> ExpertRows:
        """Returns the rows of tokens.

        Args:
            index_NK: int64, the experts of each token.
            weights_NK: their weights.
            by_expert: whether rows are sorted by expert, as transformers' grouped products sort
                them, rather than left token by token.
        """
        expert_T, weight_T = index_NK.reshape(-1), weights_NK.reshape(-1)
        if not by_expert:
            token_T = torch.arange(len(index_NK), device=index_NK.device)
            return cls(expert_T, token_T.repeat_interleave(index_NK.shape[-1]), weight_T)
        expert_T, order_T = torch.sort(expert_T)
        return cls(expert_T, order_T // index_NK.shape[-1], weight_T[order_T])

    def at(self, index: Tensor) -> ExpertRows:
        """Returns some of the rows, by their int64 places."""
        return ExpertRows(self.expert_T[index], self.token_T[index], self.weight_T[index])


@dataclass(frozen=True)
class NeuronSettings:
    """Holds ``config.mone``: which neurons a token keeps, and in which MLPs."""

    keep_ratio: float
    score: str = "abs_activation"
    apply_to: tuple[str, ...] = ("routed",)
    rule: str = "topk"
    rule_options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Checks the settings by themselves.

        Raises:
            ValueError: naming the setting.
        """
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"mone.keep_ratio: {self.keep_ratio} is not in (0, 1]")
        # Unknown names are errors of the registries.
        SCORES[self.score]
        RULES[self.rule].read_options(self.rule_options)
        if RULES[self.rule].shifts(self.rule_options):
            raise ValueError(
                f"mone.rule_options.{RULES[self.rule].shift_option}: true changes gate projections "
                "before the activation, which no model of transformers does; it stays in training"
            )
        if unknown := set(self.apply_to) - set(TARGETS):
            raise ValueError(
                f"mone.apply_to: {sorted(unknown)[0]!r} is not one of {', '.join(TARGETS)}"
            )

    @classmethod
    def from_config(cls, settings: dict[str, Any]) -> NeuronSettings:
        """Returns the settings that ``config.mone`` holds as JSON gives it.

        Raises:
            ValueError: a key is unknown, or a value is not allowed.
        """
        try:
            return cls(**settings | {"apply_to": tuple(settings.get("apply_to", ("routed",)))})
        except TypeError as error:
            raise ValueError(f"config.mone: {settings} is not understood ({error})") from None

    def to_config(self) -> dict[str, Any]:
        """Returns ``config.mone``; the rule is left out where it is the usual one."""
        settings = asdict(self) | {"apply_to": list(self.apply_to)}
        if self.rule == "topk":
            del settings["rule"], settings["rule_options"]
        return settings

    def kept(self, neurons: int) -> int:
        """Returns K, how many of ``neurons`` neurons a token keeps.

        Raises:
            ValueError: the ratio keeps none of them.
        """
        kept = count_kept(self.keep_ratio, neurons)
        if kept < 1:
            raise ValueError(f"mone.keep_ratio: {self.keep_ratio} of {neurons} neurons keeps none")
        return kept

    def check(self, neurons: int) -> None:
        """Checks that ``neurons`` neurons can be selected among.

        Raises:
            ValueError: the ratio keeps none of them, or the rule refuses the budget.
        """
        RULES[self.rule].budget(self.keep_ratio, neurons, self.rule_options)

    def mask(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        activate: Callable[[Tensor], Tensor] | None,
        neurons: Neurons | None = None,
        *,
        product_TF: Tensor | None = None,
        down_norm: Callable[[], Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        rows: ExpertRows | None = None,
    ) -> Tensor:
        """Returns True at the neurons that each row keeps; see :mod:`.kernels.reference`.

        Args:
            gate_TF: gate projections, of this rank's neurons.
            up_TF: up projections.
            activate: a as a function of g; None where the experts do not define it.
            neurons: all of them, where other ranks may have some; None for those that are here.
            product_TF: a * u, where the experts compute it in a way of their own.
            down_norm: gives the norm of each neuron's row of the down projection, broadcasting to
                ``[T, F]``; called for scores that read it.
            state: the rule's state by name, ``[E]`` each; see :func:`state_of`.
            rows: what the rows are of; None for rows of one expert, each another token's.

        Raises:
            ValueError: some neurons are elsewhere, and it is not known where, or the rule cannot
                select over them.
        """
        neurons, rule = neurons or Neurons("MLP", gate_TF.shape[-1]), RULES[self.rule]
        budget = rule.budget(self.keep_ratio, neurons.count, self.rule_options)
        if problem := rule.shard_problem(budget, len(neurons.widths())):
            raise ValueError(f"{neurons.owner}: {problem}; load the model unsplit")
        if lost := rule.state.keys() - (state or {}).keys():
            raise ValueError(
                f"mone.rule: {self.rule} selects by a state ({', '.join(sorted(lost))}) that "
                f"{neurons.owner} does not hold; only a model that was trained with the rule does"
            )
        with torch.no_grad():
            scores_TF = (
                SCORES[self.score]
                .of(
                    gate_TF=gate_TF,
                    up_TF=up_TF,
                    activate=activate,
                    product_TF=product_TF,
                    down_norm_TF=down_norm() if self.reads_down_norm and down_norm else None,
                )
                .flatten(0, -2)
            )

            def largest_of(values_TG: Tensor, k: int) -> Tensor:
                size = scores_TF.shape[-1] // values_TG.shape[-1]
                return neurons.in_groups(size).topk_mask(values_TG, k)

            seen = Rows(
                scores_TF=scores_TF,
                budget=budget,
                largest_of=largest_of,
                expert_T=torch.zeros(len(scores_TF), dtype=torch.int64, device=gate_TF.device)
                if rows is None
                else rows.expert_T,
                state=state or {},
                shards=None if neurons.mesh is None else neurons,
                token_T=None if rows is None else rows.token_T,
                weight_T=None if rows is None else rows.weight_T,
            )
            return rule.mask(seen).view(gate_TF.shape)

    def select(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        activate: Callable[[Tensor], Tensor],
        neurons: Neurons | None = None,
        down_norm: Callable[[], Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        rows: ExpertRows | None = None,
    ) -> Tensor:
        """Returns the down projection's input: ``a * u`` at the kept neurons, else zero.

        The parameters are those of :meth:`mask`.
        """
        hidden_TF = activate(gate_TF) * up_TF
        if self.kept(count := neurons.count if neurons else gate_TF.shape[-1]) == count:
            return hidden_TF
        mask_TF = self.mask(
            gate_TF,
            up_TF,
            activate,
            neurons,
            down_norm=down_norm,
            state=state,
            rows=rows,
        )
        return hidden_TF * mask_TF

    @property
    def reads_down_norm(self) -> bool:
        """Returns whether the score reads the norm of a neuron's row of the down projection."""
        return "down_norm" in SCORES[self.score].reads

    @property
    def reads_activation(self) -> bool:
        """Returns whether the score reads ``|a|`` itself, which not all experts define."""
        return "activation" in SCORES[self.score].reads

    @property
    def is_top_k(self) -> bool:
        """Returns whether sparse decoding can select so: the K largest, by gate and up alone."""
        return RULES[self.rule].top_k and not self.reads_down_norm


def hold_state(module: nn.Module, settings: NeuronSettings, neurons: int, experts: int) -> None:
    """Gives a module the buffers of the rule's state, at their initial values.

    Args:
        module: experts, or an MLP.
        settings: which name the rule.
        neurons: how many an expert has; where all are kept there is no state.
        experts: how many there are.
    """
    if settings.kept(neurons) == neurons:
        return
    for name, initial in RULES[settings.rule].state.items():
        value_E = torch.full((experts,), initial, dtype=torch.float32)
        module.register_buffer(f"{STATE_PREFIX}{name}", value_E)


def reset_state(module: nn.Module, rule: str) -> None:
    """Gives the buffers of a rule's state their initial values."""
    for name, initial in RULES[rule].state.items():
        buffer = getattr(module, f"{STATE_PREFIX}{name}", None)
        if buffer is not None:
            # Leaves what was loaded.
            init.constant_(buffer, initial)


def state_of(module: Any, settings: NeuronSettings) -> dict[str, Tensor]:
    """Returns what a module holds of the rule's state, by name, fp32 ``[E]`` each.

    Raises:
        ValueError: a part of its experts is on other devices.
    """
    rule = RULES[settings.rule]
    names = rule.state
    if rule.pools and getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"mone.rule: {settings.rule} ranks the neurons of all experts of a token together, "
            "which are not split over devices; load the model without expert parallelism"
        )
    if names and getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"mone.rule: {settings.rule} selects by a state of each expert, which is not split "
            "over devices; load the model without expert parallelism"
        )
    held = {name: getattr(module, f"{STATE_PREFIX}{name}", None) for name in names}
    return {name: value_E for name, value_E in held.items() if value_E is not None}


def selects(experts: ExpertsModule) -> bool:
    """Returns whether ``config.mone`` asks for a selection in routed experts."""
    settings = getattr(experts.config, "mone", None)
    if not settings:
        return False
    return "routed" in NeuronSettings.from_config(settings).apply_to


def _can_select(experts: ExpertsModule) -> bool:
    """Returns whether their implementation is one that selects."""
    function = ALL_EXPERTS_FUNCTIONS.get(experts.config._experts_implementation, None)
    return getattr(function, "selects_neurons", False)


def is_selecting(experts: ExpertsModule) -> bool:
    """Returns whether these experts select now: their settings and their implementation do."""
    return _can_select(experts) and selects(experts)


def asked_to_select(module: Any) -> bool:
    """Returns whether the settings ask for a selection in experts, or in an MLP of our class."""
    if hasattr(module, "mone_target"):
        return module.neurons is not None
    return selects(module)


def settings_of(experts: ExpertsModule) -> NeuronSettings:
    """Returns what ``config.mone`` says for these experts.

    Raises:
        ValueError: when it is not set, or the experts have no gate to select by.
    """
    if not getattr(experts.config, "mone", None):
        raise ValueError(
            "config.mone is not set: call mone_megatron.hf.enable_mone(model, keep_ratio=...)"
        )
    if not experts.has_gate:
        raise ValueError(f"{type(experts).__name__} has no gate projection to select by")
    return NeuronSettings.from_config(experts.config.mone)


def has_own_gate(experts: ExpertsModule) -> bool:
    """Returns whether these experts compute something else than ``act_fn(gate) * up``."""
    own = getattr_static(type(experts), "_apply_gate") is not _default_apply_gate
    return own and not rectifies_up(experts)


def rectifies_up(experts: ExpertsModule) -> bool:
    """Returns whether these experts compute ``act_fn(gate) * max(up, 0)``."""
    return bool(getattr(experts, "rectifies_up", False))


def split_projections(experts: ExpertsModule, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns gate and up projections of what the joint projection gives, each ``[..., F]``.

    Up projections are as the experts' product has them: max(u, 0) where they rectify them.
    """
    if experts.is_concatenated:
        gate_TF, up_TF = gate_up.chunk(2, dim=-1)
    else:
        gate_TF, up_TF = gate_up[..., ::2], gate_up[..., 1::2]
    return gate_TF, up_TF.relu() if rectifies_up(experts) else up_TF


def fills_places(experts: Any) -> bool:
    """Returns whether experts of weight 0 fill the places of tokens that chose fewer than others.

    Then the rows of these experts are not the token's.
    """
    return bool(getattr(experts, "any_count", False))


def has_own_weights(experts: Any) -> bool:
    """Returns whether these are experts of our class with a gate that is not the usual one."""
    return bool(getattr(experts, "gate_weights", None))


def watch_experts(experts: nn.Module) -> None:
    """Makes an experts module say how its neurons are spread, and raise when none were selected.

    Only the module itself sees how transformers splits its weights: while it computes, they are
    this rank's plain tensors.
    """
    if "_neurons" not in vars(experts):
        experts.register_forward_pre_hook(_see_neurons)
        width = _width(cast(ExpertsModule, experts))
        cast(Any, experts)._neurons = Neurons(type(experts).__name__, width)
    watch(experts, is_selecting)


def _see_neurons(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    experts = cast(ExpertsModule, module)
    weight = experts.down_proj
    if isinstance(weight, DTensor):
        axis = 1 if experts.is_transposed else 2
        cast(Any, module)._neurons = Neurons.of(
            type(module).__name__, _width(experts), weight, axis
        )
    if torch.compiler.is_dynamo_compiling() or _can_select(experts):
        return
    if selects(experts):
        _warn(
            f"config.mone is set, but experts_implementation "
            f"{experts.config._experts_implementation!r} computes all neurons of the routed "
            "experts; set_experts_implementation('mone') selects"
        )


@lru_cache
def _warn(message: str) -> None:
    """Says something once, on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(message)


def _width(experts: ExpertsModule) -> int:
    """Returns an expert's neurons by its own account, which parallelism leaves as it is."""
    for name in ("intermediate_dim", "intermediate_size"):
        if hasattr(experts, name):
            return int(getattr(experts, name))
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def neurons_of(experts: ExpertsModule) -> Neurons:
    """Returns an expert's neurons: how many, and which ranks share them.

    Raises:
        ValueError: some ranks do, and the module was not watched when its weights told which.
    """
    known: Neurons | None = vars(experts).get("_neurons")
    if known is not None:
        return known
    name = type(experts).__name__
    if getattr(experts, "_is_hooked", False) and not experts._is_expert_parallel:
        raise ValueError(
            f"{name}: its neurons are split over ranks, and which ranks is not known; call "
            "mone_megatron.hf.enable_mone(model, keep_ratio=...) after from_pretrained"
        )
    return Neurons(name, _width(experts))


class _Selecting:
    """Shows an experts module to transformers' functions with a gate that selects."""

    def __init__(self, experts: ExpertsModule, rows: ExpertRows) -> None:
        """Looks at an experts module.

        Args:
            experts: the module.
            rows: what the rows are of that the gate will see.
        """
        self._experts = experts
        self._rows = rows
        self._settings = settings_of(experts)
        self._neurons = neurons_of(experts)
        self._state = state_of(experts, self._settings)
        self._own_gate = has_own_gate(experts)
        if self._own_gate and self._settings.reads_activation:
            defined = [score.name for score in SCORES if "activation" not in score.reads]
            raise ValueError(
                f"{type(experts).__name__} computes its gate in a way of its own, so |a| is not "
                f"defined: use one of the scores {', '.join(defined)}"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate_TF, up_TF = split_projections(self._experts, gate_up)
        settings = self._settings
        if not self._own_gate:
            return settings.select(
                gate_TF,
                up_TF,
                self._experts.act_fn,
                self._neurons,
                self._down_norm,
                self._state,
                self._rows,
            )
        hidden_TF: Tensor = self._experts._apply_gate(gate_up)
        mask_TF = settings.mask(
            gate_TF,
            up_TF,
            None,
            self._neurons,
            product_TF=hidden_TF,
            down_norm=self._down_norm,
            state=self._state,
            rows=self._rows,
        )
        return hidden_TF * mask_TF

    def _down_norm(self) -> Tensor:
        return down_norms(self._experts, self._rows.expert_T)


@torch.no_grad()
def down_norms(experts: ExpertsModule, expert_T: Tensor) -> Tensor:
    """Returns the norm of each neuron's row of the down projection, fp32 ``[T, F]``.

    Args:
        experts: whose down projection.
        expert_T: int64, the expert of each row; experts of other devices count as the last here.
    """
    axis = 2 if experts.is_transposed else 1
    norm_EF = torch.linalg.vector_norm(experts.down_proj, dim=axis, dtype=torch.float32)
    return norm_EF[expert_T.clamp(max=len(norm_EF) - 1)]


def _through(forward: ExpertsForward, *, by_expert: bool) -> ExpertsForward:
    """Returns an experts function with selection.

    Args:
        forward: transformers' own.
        by_expert: whether it sorts its rows by expert, rather than leaving them token by token.
    """

    def selecting_forward(
        self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Returns the output ``[N, h]`` of tokens ``[N, h]``, summed over their experts.

        ``top_k_index`` and ``top_k_weights`` are the numbers and weights of each token's experts,
        ``[N, K]``.
        """
        note_selected(self)
        experts = cast(ExpertsModule, self)
        split = bool(experts._is_expert_parallel)
        if has_own_weights(experts) or (fills_places(experts) and not split):
            return _chosen_rows_forward(experts, hidden_states, top_k_index, top_k_weights)
        settings = settings_of(experts)
        if not torch.compiler.is_dynamo_compiling():
            # A model that selects is saved as one, which transformers leaves out; as mone, which
            # every program with the model's code knows.
            experts.config.experts_implementation = MONE
        seen: Any = experts
        if "routed" in settings.apply_to:
            rows = ExpertRows.of(top_k_index, top_k_weights, by_expert=by_expert)
            seen = _Selecting(experts, rows)
        return forward(seen, hidden_states, top_k_index, top_k_weights)

    return selecting_forward


def _chosen_rows_forward(
    experts: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes experts of our class by grouped products, of rows that their token chose.

    It is for gates that are not the usual one, and for routers after which some rows are none.

    Raises:
        ValueError: a part of the experts is on other devices.
    """
    if experts._is_expert_parallel:
        raise ValueError(
            f"{type(experts).__name__}: experts with such a gate are not split over devices; load "
            "the model without expert parallelism"
        )
    _, order_R = torch.sort(top_k_index.reshape(-1))
    rows = ExpertRows.of(top_k_index, top_k_weights, by_expert=True)
    if fills_places(experts):
        chosen_R = rows.weight_T.nonzero().squeeze(-1)
        order_R, rows = order_R[chosen_R], rows.at(chosen_R)
    expert_R = rows.expert_T
    counts_E = torch.histc(
        expert_R.float(), bins=experts.num_experts, min=0, max=experts.num_experts - 1
    )
    ends_E = counts_E.cumsum(0).to(torch.int32)

    def product(rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        return _grouped_linear(rows_RI, weight_EOI, ends_E)

    rows_RH = hidden_states[rows.token_T]
    gate_RF, up_RF = cast(Any, experts).gate_and_up(rows_RH, product)
    if selects(experts):
        hidden_RF = settings_of(experts).select(
            gate_RF,
            up_RF,
            experts.act_fn,
            neurons_of(experts),
            lambda: down_norms(experts, expert_R),
            state_of(experts, settings_of(experts)),
            rows,
        )
    else:
        hidden_RF = experts.act_fn(gate_RF) * up_RF
    output_RH = product(hidden_RF, experts.down_proj) * rows.weight_T.unsqueeze(-1)
    places_RH = output_RH.new_zeros(top_k_index.numel(), output_RH.shape[-1])
    by_token_RH = places_RH.index_copy(0, order_R, output_RH)
    output: Tensor = by_token_RH.unflatten(0, top_k_index.shape).sum(dim=1)
    return output.to(hidden_states.dtype)


mone_experts_forward = _through(grouped_mm_experts_forward, by_expert=True)
mone_batched_mm_experts_forward = _through(batched_mm_experts_forward, by_expert=False)


def register_selecting(name: str, forward: ExpertsForward) -> None:
    """Makes an experts implementation that selects neurons known to transformers.

    The function must call :func:`~mone_megatron.hf.guard_mone.note_selected` on the module that it
    computes.
    """
    cast(Any, forward).selects_neurons = True
    ALL_EXPERTS_FUNCTIONS.register(name, forward)


def register_experts() -> None:
    """Makes ``mone`` and ``mone_batched_mm`` known to transformers; may be called again."""
    register_selecting(MONE, mone_experts_forward)
    register_selecting(MONE_BATCHED, mone_batched_mm_experts_forward)


def enable_mone(
    model: PreTrainedModel,
    *,
    keep_ratio: float,
    score: str = "abs_activation",
    apply_to: Sequence[str] = ("routed",),
) -> None:
    """Makes a transformers MoE select neurons in its routed experts; its weights stay untouched.

    The settings go into the configuration and are saved with the model, and so does the name of
    the experts implementation: a program that does not know it refuses to load the model. Shared
    experts and dense layers select only in our own model class (:mod:`.modeling_mone`).

    A model that is split over ranks must be loaded before this call.

    Args:
        model: any with experts behind transformers' experts interface.
        keep_ratio: share of an expert's neurons that a token keeps, in (0, 1].
        score: name of the score by which neurons are ranked.
        apply_to: MLPs that select, of ``routed``, ``shared`` and ``dense``.

    Raises:
        ValueError: for settings that are wrong, or that the model's modules cannot follow.
    """
    settings = NeuronSettings(keep_ratio, score, tuple(apply_to))
    modules = experts_modules(model)
    if not modules and "routed" in settings.apply_to:
        raise ValueError(
            f"{type(model).__name__} has no experts behind transformers' experts interface"
        )
    others = sorted(set(settings.apply_to) - {"routed"})
    if others and model.config.model_type != "mone":
        raise ValueError(
            f"mone.apply_to: {type(model).__name__} can select in routed experts only, not in "
            f"{others[0]} ones; use ['routed']"
        )
    for target in others:
        if not any(getattr(module, "mone_target", "") == target for module in model.modules()):
            raise ValueError(f"mone.apply_to: {type(model).__name__} here has no {target} MLPs")
    for config in (model.config, *(cast(ExpertsModule, module).config for module in modules)):
        config.mone = settings.to_config()
        config.experts_implementation = MONE
    model.set_experts_implementation(MONE)
    for module in modules:
        watch_experts(module)
    for module in model.modules():
        if hasattr(module, "mone_target"):
            asked = module.mone_target in settings.apply_to
            cast(Any, module).neurons = settings if asked else None
    guard(model, asked_to_select)
