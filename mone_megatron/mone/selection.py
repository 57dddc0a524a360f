"""Selects the neurons that a token keeps, also when they are spread over ranks.

A rule (:mod:`mone_megatron.methods.rules`) chooses by scores (:mod:`mone_megatron.methods.scores`).
This file gives it what it chooses among, and keeps its state.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, E experts on this rank,
C candidates of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor, nn

from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import Activate, TopK, neuron_scores
from mone_megatron.methods.rule import STATE_PREFIX, Budget, Rows
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.module_calls import calls_only
from mone_megatron.mone.balance import sum_over_ranks
from mone_megatron.mone.density import DensityMeter


@dataclass(frozen=True)
class NeuronSelection:
    """Says how neurons are chosen: a rule, its options, a score and a keep ratio."""

    keep_ratio: float
    score: str = "abs_activation"
    rule: str = "topk"
    rule_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def budget(self, neurons: int) -> Budget:
        """Returns how many of ``neurons`` (f of the whole expert) are kept.

        Raises:
            ValueError: the rule is unknown, the ratio keeps no neuron or is above 1, or the rule
                refuses it.
        """
        return RULES[self.rule].budget(self.keep_ratio, neurons, self.rule_options)


def sharded_topk_mask(scores_TF: Tensor, k: int, group: dist.ProcessGroup) -> Tensor:
    """Returns the mask of the K largest scores of rows that lie on several ranks.

    Rank r of ``group`` holds neurons ``r*F .. (r+1)*F`` of every row. Any of the K largest of a
    whole row is among the K largest of its rank, so ``min(k, F)`` candidates a rank decide the
    threshold exactly, and how many ties each rank may take.

    Returns:
        This rank's part of the mask, ``[T, F]`` bool. Collective over ``group``.
    """
    candidates_TC = scores_TF.detach().topk(min(k, scores_TF.shape[-1]), dim=-1).values
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered = [torch.empty_like(candidates_TC) for _ in range(size)]
    dist.all_gather(gathered, candidates_TC.contiguous(), group=group)
    kth_T1 = torch.cat(gathered, dim=-1).topk(k, dim=-1).values.amin(dim=-1, keepdim=True)
    above_T1 = torch.stack([(part > kth_T1).sum(dim=-1, keepdim=True) for part in gathered]).sum(0)
    ties_before_T1 = torch.zeros_like(above_T1)
    for part in gathered[:rank]:
        ties_before_T1 += (part == kth_T1).sum(dim=-1, keepdim=True)
    room_T1 = k - above_T1 - ties_before_T1
    tied_TF = scores_TF == kth_T1
    return (scores_TF > kth_T1) | (tied_TF & (tied_TF.cumsum(dim=-1) <= room_T1))


@dataclass(frozen=True)
class GroupShards:
    """Gives a rule the ranks of a process group as :class:`mone_megatron.methods.rule.Shards`."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        """Returns this rank's place among those that share the neurons."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Returns how many ranks share the neurons."""
        return dist.get_world_size(self.group)

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks. Collective."""
        total = part.clone()
        dist.all_reduce(total, group=self.group)
        return total


class GradientShards(GroupShards):
    """Sums gradients over the ranks, too."""

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks. Collective, and so is its backward pass."""
        return sum_over_ranks(part, self.group)


class NeuronSelector(nn.Module):
    """Chooses the kept neurons of each row, as a module, so that forward hooks can read the mask.

    The state of a rule that has one is a buffer ``rule_NAME`` of shape ``[E]`` each. What a step's
    rows say of it is added up until :meth:`advance` moves it, once a step and over all ranks, so
    that it is the same in every layout.
    """

    def __init__(
        self,
        selection: NeuronSelection,
        neurons: int,
        group: dist.ProcessGroup | None = None,
        activate: Activate = F.silu,
        *,
        num_local_experts: int = 1,
        first_expert: int = 0,
        num_experts: int = 1,
        replica_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Prepares to select among ``neurons`` (f of the whole expert, over all of ``group``).

        Args:
            selection: the rule, its options, keep ratio and score.
            neurons: f, how many the whole expert has.
            group: the ranks that share the neurons of one expert, in neuron order; None or a
                group of one when this rank holds them all.
            activate: the activation of the gate projection.
            num_local_experts: E, the experts on this rank.
            first_expert: global index of the first of them.
            num_experts: experts of the layer over all ranks.
            replica_group: ranks that hold these same neurons for other tokens; None for none.

        Raises:
            ValueError: for an unknown rule or score, a budget that the rule refuses, or neurons
                spread over ranks by a rule that cannot select over them.
        """
        super().__init__()
        self.selection = selection
        self.neurons = neurons
        self.activate = activate
        self.rule = RULES[selection.rule]
        self.score = SCORES[selection.score]
        self.budget = selection.budget(neurons)
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        if problem := self.rule.shard_problem(self.budget, ranks):
            raise ValueError(
                f"{problem}; use parallel.expert_tensor=1 (routed) and parallel.tensor=1 (shared, "
                "dense)"
            )
        self.replica_group = replica_group
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.num_experts = num_experts
        for name, initial in self.rule.state.items():
            value_E = torch.full((num_local_experts,), initial, dtype=torch.float32)
            self.register_buffer(f"{STATE_PREFIX}{name}", value_E)
        self._observed: dict[str, Tensor] = {}
        self.meter = DensityMeter()

    @property
    def kept(self) -> int:
        """Returns K, the number of neurons of a row that the keep ratio stands for."""
        return self.budget.kept

    @property
    def most_kept(self) -> int:
        """Returns the largest number of neurons that a row keeps."""
        return self.rule.most_kept(self.budget)

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Keeps another share of the neurons from now on (``mone.keep_ratio_schedule``)."""
        self.selection = replace(self.selection, keep_ratio=keep_ratio)
        self.budget = self.selection.budget(self.neurons)

    @property
    def for_kernels(self) -> TopK | None:
        """Returns the selection as a kernel applies it; None when only this module can.

        A kernel knows the largest K of a row that it sees whole, by a score of gate and up alone.
        """
        if not self.rule.top_k or self.group is not None or "down_norm" in self.score.reads:
            return None
        return TopK(self.kept, self.score.name)

    @property
    def watched(self) -> bool:
        """Returns whether a hook or another forward wants to see the scores or the mask."""
        return not calls_only(self, NeuronSelector)

    @property
    def state(self) -> dict[str, Tensor]:
        """Returns the rule's state by name, fp32 ``[E]`` each."""
        return {name: self.get_buffer(f"{STATE_PREFIX}{name}") for name in self.rule.state}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeuronSelector:
        """Moves the state with the module, and leaves it in fp32: a step moves it by little."""
        applied: NeuronSelector = super()._apply(fn, recurse)
        for name, value_E in self.state.items():
            setattr(self, f"{STATE_PREFIX}{name}", value_E.float())
        return applied

    @property
    def shifts(self) -> bool:
        """Returns whether the rule changes gate projections before neurons are chosen."""
        return self.rule.shifts(self.selection.rule_options)

    def shifted(self, gate_TF: Tensor) -> Tensor:
        """Returns the gate projections less what the rule takes from each row."""
        assert self.rule.shift is not None, "asked only of rules that shift"
        rows = Rows(
            scores_TF=gate_TF,
            budget=self.budget,
            largest_of=self._largest,
            expert_T=torch.zeros(len(gate_TF), dtype=torch.int64, device=gate_TF.device),
            shards=None if self.group is None else GradientShards(self.group),
        )
        return (gate_TF - self.rule.shift(rows)).to(gate_TF.dtype)

    @torch.no_grad()
    def forward(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        expert_T: Tensor | None = None,
        down_norm_TF: Tensor | None = None,
        *,
        observing: bool = False,
        block_T: Tensor | None = None,
        token_T: Tensor | None = None,
        weight_T: Tensor | None = None,
    ) -> Tensor:
        """Returns the mask of kept neurons, ``[T, F]`` bool.

        Args:
            gate_TF: gate projections, this rank's neurons.
            up_TF: up projections, this rank's neurons.
            expert_T: int64, the expert on this rank that each row belongs to; None for one expert.
            down_norm_TF: the norm of each neuron's row of the down projection, broadcasting to
                ``[T, F]``, for scores that read it.
            observing: whether the rows count for the state of the rule.
            block_T: int64, equal for rows of one expert and one microbatch; None where each
                expert's are.
            token_T: int64, equal for rows of one token; None where each row is a token.
            weight_T: the router's weight of each row; None for 1.
        """
        scores_TF = neuron_scores(
            gate_TF, up_TF, self.score.name, self.activate, down_norm_TF=down_norm_TF
        )
        if expert_T is None:
            expert_T = torch.zeros(len(gate_TF), dtype=torch.int64, device=gate_TF.device)
        rows = Rows(
            scores_TF=scores_TF,
            budget=self.budget,
            largest_of=self._largest,
            expert_T=expert_T,
            num_experts=self.num_local_experts,
            shards=None if self.group is None else GroupShards(self.group),
            state=self.state,
            training=self.training,
            blocks=block_T,
            token_T=token_T,
            weight_T=weight_T,
        )
        mask_TF = self.rule.mask(rows)
        if observing:
            self.meter.add(mask_TF)
        if observing and self.rule.observe is not None:
            for name, sum_E in self.rule.observe(rows, mask_TF).items():
                before_E = self._observed.get(name)
                self._observed[name] = sum_E if before_E is None else before_E + sum_E
        return mask_TF

    def _largest(self, scores_TF: Tensor, k: int) -> Tensor:
        """Returns the mask of the k largest of each row, over all ranks that share the row."""
        if self.group is None:
            return ops.topk_mask(scores_TF, k)
        return sharded_topk_mask(scores_TF, k, self.group)

    @torch.no_grad()
    def advance(self, *, applied: bool) -> None:
        """Moves the state by what the rows of a step said of it; nothing for rules without state.

        Collective over the ranks that hold the same experts.

        Args:
            applied: whether the step was; what a step that is thrown away said is forgotten.
        """
        if self.rule.observe is None or self.rule.advance is None:
            return
        observed, self._observed = self._observed, {}
        # Nothing was selected where all neurons are kept (mone.keep_ratio_schedule).
        if not applied or not observed:
            return
        if self.replica_group is not None:
            for name in sorted(observed):
                dist.all_reduce(observed[name], group=self.replica_group)
        for name, value_E in self.rule.advance(self.state, observed, self.budget).items():
            self.get_buffer(f"{STATE_PREFIX}{name}").copy_(value_E)

    @torch.no_grad()
    def steer(self, name: str, value: float) -> None:
        """Gives all experts one value of a number of the state that is steered from outside."""
        for state, held in {name: value, **self.rule.steerable[name].beside}.items():
            self.get_buffer(f"{STATE_PREFIX}{state}").fill_(held)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Returns the rule's state as global tensors ``[num_experts]``, for any layout."""
        axes = len(sharded_offsets)
        ranks = self.num_experts // self.num_local_experts
        replica = (0, *(0 if g is None else dist.get_rank(g) for g in self._copies))
        return {
            f"{prefix}{STATE_PREFIX}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{STATE_PREFIX}{name}",
                value_E,
                *sharded_offsets,
                (axes, self.first_expert // self.num_local_experts, ranks),
                replica_id=replica,
                prepend_axis_num=axes,
            )
            for name, value_E in self.state.items()
        }

    @property
    def _copies(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Returns the groups whose ranks hold the same state: neuron shards and replicas."""
        return self.group, self.replica_group

    def extra_repr(self) -> str:
        """Returns what ``print(model)`` shows."""
        return f"{self.rule.name}: keep {self.kept} of {self.neurons} by {self.score.name}"
