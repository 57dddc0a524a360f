"""Holds what every MLP that selects neurons shares: selection, balance loss and counts.

Used by the routed experts (:mod:`.experts`) and by shared experts and dense layers (:mod:`.mlp`).

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments (one expert's
tokens of one microbatch), E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import (
    Activate,
    Keep,
    Packed,
    WeightSums,
    segment_matrix,
)
from mone_megatron.methods.activations import up_function
from mone_megatron.methods.loss import SelectionSums
from mone_megatron.methods.losses import LOSSES
from mone_megatron.module_calls import calls_only
from mone_megatron.mone.balance import (
    AttachedLinear,
    NeuronBalance,
    neuron_weights,
    sum_over_ranks,
)
from mone_megatron.mone.chunk_unions import ChunkUnions, TokenOrder
from mone_megatron.mone.layer_numbers import count_layers
from mone_megatron.mone.metrics import Usage
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector
from mone_megatron.mone.sparsity import Sparsity
from mone_megatron.mone.straight_through import masked_straight_through

# The balance loss's name in megatron-core's tracker of auxiliary losses.
NEURON_BALANCE_LOSS = "neuron_balance_loss"


@dataclass(frozen=True)
class NeuronSettings:
    """Holds the method's settings for one kind of MLP: which neurons are kept, and how balanced."""

    selection: NeuronSelection
    balance: NeuronBalance = field(default_factory=NeuronBalance)
    # What the backward pass finds: all gate and up values, or only those of kept neurons.
    memory: Literal["full", "packed"] = "full"
    # Whether neurons that are left out get gradients as if they were kept.
    straight_through: bool = False


@dataclass(frozen=True)
class Segments:
    """Says which rows belong together for the balance loss.

    ``index_T`` numbers each row's segment; segment ``m * E + e`` holds the tokens that expert e
    got from microbatch m. ``shared_group``: ranks with other tokens of the same segments.
    ``in_order``: whether ``index_T`` never decreases. ``weight``: how many microbatches each
    segment stands for: losses add up over microbatches. ``token_T``: int64, equal for rows of one
    token; None where each row is a token, or nobody asks (:attr:`NeuronGate.pools`). ``order``:
    where the rows' tokens stand in their sequences; None where that is not known, or nobody asks.
    """

    index_T: Tensor
    num_microbatches: int
    shared_group: dist.ProcessGroup | None
    in_order: bool = False
    weight: int = 1
    token_T: Tensor | None = None
    order: TokenOrder | None = None


def _scaled(hidden_TF: Tensor, scale_T: Tensor) -> Tensor:
    return (hidden_TF * scale_T.unsqueeze(-1)).to(hidden_TF.dtype)


class NeuronGate(MegatronModule):
    """Computes the gated linear unit between an expert's projections, and selects its neurons."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        settings: NeuronSettings | None,
        neurons: int,
        num_experts: int,
        num_local_experts: int,
        first_expert: int,
        neuron_group: dist.ProcessGroup,
        replica_group: dist.ProcessGroup,
        sparsity: Sparsity | None = None,
    ) -> None:
        """Prepares for experts of ``neurons`` neurons over ``neuron_group``.

        Args:
            config: megatron-core's configuration of the model.
            settings: None for a plain expert.
            neurons: f, over all ranks of ``neuron_group``.
            num_experts: experts of the layer over all ranks.
            num_local_experts: experts on this rank.
            first_expert: global index of the first of them.
            neuron_group: ranks that share the neurons of these experts.
            replica_group: ranks that hold these same neurons for other tokens.
            sparsity: the loss on hidden values; None for none.

        Raises:
            ValueError: when the keep ratio keeps no neuron.
        """
        super().__init__(config=config)
        self.num_experts = num_experts
        self.num_local_experts = num_local_experts
        self.num_layers = count_layers(config)
        self.layer_number: int | None = None
        self.neuron_group = neuron_group if dist.get_world_size(neuron_group) > 1 else None
        self.usage = Usage(
            num_local_experts=num_local_experts,
            first_expert=first_expert,
            num_experts=num_experts,
            neuron_group=self.neuron_group,
            replica_group=replica_group if dist.get_world_size(replica_group) > 1 else None,
        )
        self.unions = ChunkUnions()
        self.activate: Activate = config.activation_func
        self.activate_up = up_function(self.activate)
        self.balance = settings.balance if settings else NeuronBalance()
        self.loss = LOSSES[self.balance.kind]
        self.sparsity = sparsity
        self.selector: NeuronSelector | None = None
        self.memory = settings.memory if settings else "full"
        self.straight_through = settings.straight_through if settings else False
        assert not (self.straight_through and self.memory == "packed"), "checked by config.validate"
        if settings is not None and settings.selection.budget(neurons).kept < neurons:
            self.selector = NeuronSelector(
                settings.selection,
                neurons,
                neuron_group,
                self.activate,
                num_local_experts=num_local_experts,
                first_expert=first_expert,
                num_experts=num_experts,
                replica_group=self.usage.replica_group,
            )
            self.usage.counts_active = self.selector.rule.needs_up_of_active(
                self.selector.score, changes_up=self.activate_up is not None
            )

    def forward(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        segments: Segments,
        project: Callable[[Tensor], Tensor] = lambda hidden_TF: hidden_TF,
        down_norm: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Returns the down projection of the unit's hidden values.

        Args:
            gate_TF: gate projections, this rank's neurons.
            up_TF: up projections, this rank's neurons.
            scale_T: the router's probability of each row, or None.
            segments: which rows belong together for the balance loss.
            project: the down projection of ``[T, F]`` hidden values; by default they are returned.
                In packed memory mode what it saves of them is rebuilt in the backward pass.
            down_norm: gives the norm of each neuron's row of the down projection, fp32 ``[E, F]``;
                needed by scores that read it.
        """
        if self.activate_up is not None:
            up_TF = self.activate_up(up_TF)
        if self.selector is not None and self._selecting and self.selector.shifts:
            gate_TF = self.selector.shifted(gate_TF)
        packed = self._packed(gate_TF)
        # Under activation recomputation the first forward runs without gradients: observe once.
        observing = self.training and torch.is_grad_enabled()

        def mask() -> Tensor:
            return self._mask(gate_TF, up_TF, scale_T, segments, down_norm, observing=observing)

        if self.sparsity is None:
            hidden_TF = self._hidden(gate_TF, up_TF, scale_T, segments, packed, mask, observing)
        else:
            # The loss sees hidden values before they are scaled.
            hidden_TF = self._hidden(gate_TF, up_TF, None, segments, packed, mask, observing)
            hidden_TF, packed = self._sparse(hidden_TF, scale_T, segments, packed, observing)
        if packed is None:
            return project(hidden_TF)
        with ops.rebuilt_when_needed(hidden_TF, packed):
            return project(hidden_TF)

    def choice(self) -> ops.Choice | None:
        """Returns what a kernel of whole experts needs to know of this unit, as it is used now.

        None where this module has something to do between the projections.
        """
        plain = self.activate is F.silu and self.activate_up is None and self.sparsity is None
        observing = self.training and torch.is_grad_enabled()
        busy = observing and self.usage.collecting
        if not plain or busy or not calls_only(self, NeuronGate):
            return None
        if not self._selecting:
            return ops.Choice()
        assert self.selector is not None
        keep, balance = self.selector.for_kernels, self.balance
        if self.selector.shifts or self.selector.watched or self.straight_through:
            return None
        if self.memory == "packed" or keep is None or keep.score != ops.KERNEL_SCORE:
            return None
        if not observing or not self._balancing:
            return ops.Choice(keep.k)
        if self.loss.signed or balance.weights != "selected":
            return None
        return ops.Choice(keep.k, sums=True, normalize=balance.normalize)

    def run_each_kernel(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        segments: Segments,
        down_norm: Callable[[], Tensor] | None,
        *,
        looking: bool,
        keeping_all: bool,
    ) -> str | None:
        """Runs, forward and backward, all kernels that calls of this unit can need.

        Nothing is counted, logged or observed, so that it can be done before the first step: a
        kernel is compiled when it is first run. Collective where neurons are spread over ranks.

        Args:
            gate_TF: gate projections of some rows, in memory as they are in a run.
            up_TF: up projections of the same rows, likewise.
            scale_T: the router's probability of each row, or None.
            segments: which rows belong together for the balance loss.
            down_norm: see :meth:`forward`.
            looking: whether some steps count which neurons are kept.
            keeping_all: whether some steps keep all neurons.

        Returns:
            What torch computes although kernels are chosen, in words; None for nothing.
        """

        def units() -> tuple[Tensor, Tensor]:
            wanted = torch.is_grad_enabled()
            gate, up = (one.detach().requires_grad_(wanted) for one in (gate_TF, up_TF))
            if self.activate_up is not None:
                up = self.activate_up(up)
            if self.selector is not None and self._selecting and self.selector.shifts:
                gate = self.selector.shifted(gate)
            return gate, up

        def mask() -> Tensor:
            return self._mask(*units(), scale_T, segments, down_norm, observing=False)

        usual = self._keep(mask, look=False)
        if isinstance(usual, Tensor):
            self._run_mask_outside_training(mask)
        kinds = [(usual, usual is not None and self._balancing)]
        if looking and usual is not None:
            kinds.append((mask(), True))
        if keeping_all and usual is not None:
            kinds.append((None, False))
        if self.sparsity is not None:
            scale_T = None  # its loss sees what is not scaled yet
        for keep, with_sums in kinds:
            gate, up = units()
            packed = None if keep is None else self._packed(gate)
            if with_sums:
                hidden_TF, weight_sum_SF, _ = self._with_sums(
                    gate, up, keep, scale_T, segments, packed, mask
                )
            else:
                hidden_TF = self._glu(gate, up, keep, scale_T, packed)
            loss = hidden_TF.float().sum()
            if with_sums and self.balance.coeff > 0:
                loss = loss + weight_sum_SF.sum()
            loss.backward()
            if packed is not None and packed.rebuild is not None:
                packed.rebuild()
            with torch.no_grad():
                alone_T = None if scale_T is None else scale_T.detach()
                self._glu(*units(), keep, alone_T, packed)
        if self.selector is not None and isinstance(usual, Tensor) and self.selector.rule.top_k:
            why = "it reads the down projection"
            if self.selector.group is not None:
                why = "the neurons of an expert are spread over ranks"
            return f"mone.score={self.selector.score.name}: torch makes the mask, for {why}"
        return ops.left_to_torch(*units(), usual, self.activate)

    def _run_mask_outside_training(self, mask: Callable[[], Tensor]) -> None:
        """Makes a mask as evaluation does: some rules choose in another way there."""
        assert self.selector is not None
        training = self.selector.training
        self.selector.eval()
        mask()
        self.selector.train(training)

    def _sparse(
        self,
        hidden_TF: Tensor,
        scale_T: Tensor | None,
        segments: Segments,
        packed: Packed | None,
        observing: bool,
    ) -> tuple[Tensor, Packed | None]:
        """Attaches the sparsity loss, then scales rows.

        Returns:
            The scaled hidden values, and how they are rebuilt; None when they are kept.
        """
        assert self.sparsity is not None
        if packed is not None:
            with ops.rebuilt_when_needed(hidden_TF, packed):
                scaled_TF, _ = self._sparse(hidden_TF, scale_T, segments, None, observing)
            again = packed.rebuild
            if again is None or scale_T is None:
                return scaled_TF, packed
            row_scale_T = scale_T.detach()
            return scaled_TF, Packed(packed.width, lambda: _scaled(again(), row_scale_T))
        if observing:
            hidden_TF = self.sparsity.attach(
                hidden_TF,
                segments.index_T,
                num_segments=segments.num_microbatches * self.num_local_experts,
                num_experts=self.num_experts,
                layer_number=self.layer_number,
                num_layers=self.num_layers,
            )
        return (hidden_TF if scale_T is None else _scaled(hidden_TF, scale_T)), None

    def _hidden(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        segments: Segments,
        packed: Packed | None,
        mask: Callable[[], Tensor],
        observing: bool,
    ) -> Tensor:
        collecting = observing and self.usage.collecting
        segment_ST = None
        if collecting:
            num_segments = segments.num_microbatches * self.num_local_experts
            with self.usage.timed():
                segment_ST = segment_matrix(segments.index_T, num_segments)
                tokens_ME = segment_ST.sum(dim=-1).view(-1, self.num_local_experts)
                self.usage.add_tokens(tokens_ME.sum(dim=0))
        keep = self._keep(mask, look=collecting)
        if keep is None or not observing or not (collecting or self._balancing):
            return self._glu(gate_TF, up_TF, keep, scale_T, packed)
        hidden_TF, weight_sum_SF, kept_SF = self._with_sums(
            gate_TF, up_TF, keep, scale_T, segments, packed, mask
        )
        if segment_ST is not None:
            assert isinstance(keep, Tensor)
            with self.usage.timed():
                self._count(gate_TF, keep, kept_SF, segment_ST, segments.num_microbatches)
                if segments.order is not None and self.neuron_group is None:
                    expert_T = segments.index_T % self.num_local_experts
                    self.unions.add(keep, expert_T, segments.order, self.num_experts)
        ones_T = torch.ones_like(segments.index_T, dtype=torch.float32)
        tokens_S = kept_SF.new_zeros(len(kept_SF)).scatter_add_(0, segments.index_T, ones_T)
        return self.attach_balance(
            hidden_TF, weight_sum_SF, kept_SF, tokens_S, segments.shared_group, segments.weight
        )

    def _glu(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        keep: Keep,
        scale_T: Tensor | None,
        packed: Packed | None,
    ) -> Tensor:
        """Returns the hidden values ``[T, F]`` at the kept neurons, times the router's weights."""
        if not self.straight_through or keep is None:
            return ops.selected_glu(gate_TF, up_TF, keep, scale_T, self.activate, packed=packed)
        assert isinstance(keep, Tensor)
        hidden_TF = ops.selected_glu(gate_TF, up_TF, None, scale_T, self.activate)
        return masked_straight_through(hidden_TF, keep)

    def _keep(self, mask: Callable[[], Tensor], *, look: bool) -> Keep:
        """Returns which neurons are kept: None for all, a mask, or a selection for a kernel.

        A kernel selects while it multiplies; but then nobody sees the mask.
        """
        if self.selector is None or not self._selecting:
            return None
        for_kernels = self.selector.for_kernels
        if look or for_kernels is None or self.selector.watched or self.straight_through:
            return mask()
        return for_kernels

    def _mask(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        segments: Segments,
        down_norm: Callable[[], Tensor] | None,
        *,
        observing: bool,
    ) -> Tensor:
        """Returns the mask that the selector gives for these rows, ``[T, F]`` bool."""
        assert self.selector is not None
        # Segment m * E + e holds the rows of expert e.
        expert_T = segments.index_T % self.num_local_experts
        norm_TF = None
        if "down_norm" in self.selector.score.reads:
            assert down_norm is not None, "whoever calls has the down projection"
            with torch.no_grad():
                norm_TF = down_norm()[expert_T]
        rule = self.selector.rule
        # Checked by config.validate for runs.
        assert not (rule.reads_batch and self.training and segments.shared_group is not None), (
            f"mone.rule={rule.name} ranks all rows of a block, which lie on several ranks"
        )
        mask_TF: Tensor = self.selector(
            gate_TF,
            up_TF,
            expert_T,
            norm_TF,
            observing=observing,
            block_T=segments.index_T,
            token_T=segments.token_T,
            weight_T=scale_T,
        )
        return mask_TF

    def _packed(self, gate_TF: Tensor) -> Packed | None:
        """Returns the memory mode of one call; None saves everything."""
        if self.selector is None or not self._selecting or self.memory == "full":
            return None
        # Of a row that is spread over ranks, each may keep all that the row keeps.
        return Packed(min(self.selector.most_kept, gate_TF.shape[-1]))

    def _with_sums(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        keep: Keep,
        scale_T: Tensor | None,
        segments: Segments,
        packed: Packed | None,
        mask: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns hidden values, and each segment's sums of weights and counts of kept neurons."""
        num_segments = segments.num_microbatches * self.num_local_experts
        balance = self.balance
        at_once = not self.loss.signed and (balance.weights == "selected" or packed is None)
        if self.neuron_group is None and at_once and not self.straight_through:
            sums = WeightSums(
                segments.index_T,
                num_segments,
                balance.weights,
                balance.normalize,
                segments.in_order,
                differentiable=balance.coeff > 0,
            )
            return ops.selected_glu_and_sums(
                gate_TF, up_TF, keep, scale_T, sums, self.activate, packed=packed
            )
        # A row's sum runs over ranks, or over neurons that packed mode forgets.
        mask_TF = keep if isinstance(keep, Tensor) else mask()
        hidden_TF = self._glu(gate_TF, up_TF, mask_TF, scale_T, packed)
        segment_ST = segment_matrix(segments.index_T, num_segments)
        with torch.set_grad_enabled(balance.coeff > 0):
            weight_sum_SF = segment_ST @ neuron_weights(
                activation_TF=self.activate(gate_TF),
                mask_TF=mask_TF,
                weights=balance.weights,
                normalize=balance.normalize,
                neuron_group=self.neuron_group,
                signed=self.loss.signed,
            )
        return hidden_TF, weight_sum_SF, segment_ST @ mask_TF.float()

    @property
    def _selecting(self) -> bool:
        """Returns whether some neuron is left out; with a schedule that may begin later.

        Keeping all neurons is the plain expert: the same code, bit for bit, and nothing to balance.
        """
        return self.selector is not None and self.selector.kept < self.selector.neurons

    @property
    def pools(self) -> bool:
        """Returns whether the rows of a token are ranked together."""
        return self._selecting and self.selector is not None and self.selector.rule.pools

    @property
    def _balancing(self) -> bool:
        return self._selecting and self.balance.coeff > 0

    def _count(
        self,
        gate_TF: Tensor,
        mask_TF: Tensor,
        kept_SF: Tensor,
        segment_ST: Tensor,
        num_microbatches: int,
    ) -> None:
        by_expert = (num_microbatches, self.num_local_experts, -1)
        self.usage.add_selection(
            kept_EF=kept_SF.view(by_expert).sum(dim=0),
            activation_TF=self.activate(gate_TF.detach()),
            mask_TF=mask_TF,
            expert_ET=segment_ST.view(by_expert).sum(dim=0),
        )

    def attach_balance(
        self,
        hidden: Tensor,
        weight_sum_SF: Tensor,
        kept_SF: Tensor,
        tokens_S: Tensor,
        shared_group: dist.ProcessGroup | None,
        weight: int,
    ) -> Tensor:
        """Logs the balance loss and lets it backpropagate with ``hidden``, which is returned.

        Args:
            hidden: what depends on the same gate projections.
            weight_sum_SF: of each segment, the sums of the neurons' weights.
            kept_SF: how many of its rows keep each neuron.
            tokens_S: how many rows it has, fp32.
            shared_group: see :class:`Segments`.
            weight: see :class:`Segments`.
        """
        assert self.selector is not None
        if shared_group is not None:
            counts = torch.cat([kept_SF, tokens_S.unsqueeze(-1)], dim=-1)
            dist.all_reduce(counts, group=shared_group)
            kept_SF, tokens_S = counts[:, :-1], counts[:, -1]
            if not self.loss.linear:
                weight_sum_SF = sum_over_ranks(weight_sum_SF, shared_group)
        sums = SelectionSums(
            weight_sum_SF=weight_sum_SF,
            kept_SF=kept_SF,
            tokens_S=tokens_S,
            kept_share=self.selector.kept / self.selector.neurons,
            num_experts=self.num_experts,
            neurons=self.selector.neurons,
        )
        coeff = self.balance.coeff
        if self.loss.slope is not None:
            slope_SF = self.loss.slope(sums)
            loss = torch.dot(slope_SF.flatten(), weight_sum_SF.detach().flatten())
            if weight != 1:
                loss *= weight
            if coeff > 0:
                hidden = AttachedLinear.apply(hidden, weight_sum_SF, slope_SF, coeff * weight)
        else:
            loss = self.loss.function(sums)
            if shared_group is not None and not self.loss.linear:
                loss = loss / dist.get_world_size(shared_group)
            if weight != 1:
                loss = loss * weight
            if coeff > 0:
                hidden = MoEAuxLossAutoScaler.apply(hidden, loss * coeff)
        save_to_aux_losses_tracker(NEURON_BALANCE_LOSS, loss, self.layer_number, self.num_layers)
        return hidden
