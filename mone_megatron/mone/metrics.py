"""How experts and their neurons are used: counts while training, then a few numbers a layer.

A :class:`Usage` belongs to one module that selects neurons (or routes tokens) and counts only
while ``collecting`` is set, so that its cost is paid on the steps that log it.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, E experts on this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Columns of Usage.summary, per expert.
TOKENS, LOAD_ENTROPY, DEAD_SHARE, MAX_OVER_MEAN, MASS_KEPT = range(5)
NUM_COLUMNS = 5


class Usage:
    """Counts of one module's experts on this rank since :meth:`reset`."""

    def __init__(
        self,
        *,
        num_local_experts: int,
        first_expert: int,
        num_experts: int,
        neuron_group: dist.ProcessGroup | None,
        replica_group: dist.ProcessGroup | None,
    ) -> None:
        """Start with nothing counted.

        Args:
            num_local_experts: E, experts on this rank.
            first_expert: global index of the first.
            num_experts: experts of the layer over all ranks.
            neuron_group: ranks that share the neurons of these experts; None for this one alone.
            replica_group: ranks that hold these same neurons for other tokens; None likewise.
        """
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.num_experts = num_experts
        self.neuron_group = neuron_group
        self.replica_group = replica_group
        self.collecting = False
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.tokens_E: Tensor | None = None
        self.kept_EF: Tensor | None = None
        self.mass_share_E: Tensor | None = None

    def add_tokens(self, tokens_E: Tensor) -> None:
        """Count the tokens of one forward pass."""
        tokens_E = tokens_E.float()
        self.tokens_E = tokens_E if self.tokens_E is None else self.tokens_E + tokens_E

    def add_selection(
        self, *, kept_EF: Tensor, activation_TF: Tensor, mask_TF: Tensor, expert_ET: Tensor
    ) -> None:
        """Count the kept neurons of one forward pass and their share of sum |a|.

        Args:
            kept_EF: tokens that keep each neuron, fp32.
            activation_TF: a = SiLU(g).
            mask_TF: bool, kept neurons.
            expert_ET: fp32, 1 where row t belongs to expert e.
        """
        mass_TF = activation_TF.detach().float().abs()
        sums_T2 = torch.stack([(mass_TF * mask_TF).sum(dim=-1), mass_TF.sum(dim=-1)], dim=-1)
        if self.neuron_group is not None:
            dist.all_reduce(sums_T2, group=self.neuron_group)
        share_T = sums_T2[:, 0] / sums_T2[:, 1].clamp_min(torch.finfo(torch.float32).tiny)
        share_E = expert_ET @ share_T
        self.kept_EF = kept_EF if self.kept_EF is None else self.kept_EF + kept_EF
        self.mass_share_E = share_E if self.mass_share_E is None else self.mass_share_E + share_E

    def summary(self, device: torch.device) -> Tensor:
        """``[num_experts, NUM_COLUMNS]`` fp64: this rank's experts filled in, zero elsewhere.

        Summed over the expert-parallel ranks it describes the layer. Collective over the replica
        and neuron groups. Columns: tokens; entropy of the neuron load over log f; share of
        neurons never kept; largest over mean load; share of |a| mass kept. The last four are 0
        for an expert without tokens or without selection.
        """
        table = torch.zeros(self.num_experts, NUM_COLUMNS, dtype=torch.float64, device=device)
        local = table[self.first_expert : self.first_expert + self.num_local_experts]
        if self.tokens_E is None:
            tokens_E = torch.zeros(self.num_local_experts, dtype=torch.float64, device=device)
        else:
            tokens_E = self.tokens_E.to(device, torch.float64)
        if self.replica_group is not None:
            dist.all_reduce(tokens_E, group=self.replica_group)
        local[:, TOKENS] = tokens_E
        if self.kept_EF is None or self.mass_share_E is None:
            return table
        kept_EF = self.kept_EF.to(device, torch.float64)
        mass_E = self.mass_share_E.to(device, torch.float64)
        if self.replica_group is not None:
            dist.all_reduce(kept_EF, group=self.replica_group)
            dist.all_reduce(mass_E, group=self.replica_group)
        sums_E4 = torch.stack(
            [
                kept_EF.sum(dim=-1),
                torch.xlogy(kept_EF, kept_EF).sum(dim=-1),
                (kept_EF == 0).sum(dim=-1).double(),
                torch.full_like(tokens_E, kept_EF.shape[-1]),
            ],
            dim=-1,
        )
        largest_E = kept_EF.amax(dim=-1)
        if self.neuron_group is not None:
            dist.all_reduce(sums_E4, group=self.neuron_group)
            dist.all_reduce(largest_E, op=dist.ReduceOp.MAX, group=self.neuron_group)
        total_E, xlogx_E, dead_E, neurons_E = sums_E4.unbind(dim=-1)
        used_E = total_E > 0
        total_E = total_E.clamp_min(1)
        # H(c / total) = log total - sum c log c / total.
        entropy_E = total_E.log() - xlogx_E / total_E
        local[:, LOAD_ENTROPY] = entropy_E / neurons_E.log().clamp_min(1e-12) * used_E
        local[:, DEAD_SHARE] = dead_E / neurons_E * used_E
        local[:, MAX_OVER_MEAN] = largest_E * neurons_E / total_E * used_E
        local[:, MASS_KEPT] = mass_E / tokens_E.clamp_min(1)
        return table


def expert_metrics(table: Tensor, *, with_neurons: bool) -> dict[str, float]:
    """The numbers of one layer from its summed table (:meth:`Usage.summary`).

    Args:
        table: ``[num_experts, NUM_COLUMNS]`` fp64.
        with_neurons: whether the layer may select neurons.

    Returns:
        ``router/tokens_per_expert_{min,mean,max,std}``, ``router/dead_experts`` and, with
        neurons, ``mone/load_entropy``, ``mone/dead_neuron_share``, ``mone/load_max_over_mean``,
        ``mone/mass_kept``: means over the experts that had tokens.
    """
    tokens = table[:, TOKENS]
    metrics = {
        "router/tokens_per_expert_min": tokens.min().item(),
        "router/tokens_per_expert_mean": tokens.mean().item(),
        "router/tokens_per_expert_max": tokens.max().item(),
        "router/tokens_per_expert_std": tokens.std(correction=0).item(),
        "router/dead_experts": float((tokens == 0).sum()),
    }
    used = table[tokens > 0]
    # All 0 where nothing was selected, since all neurons were kept (mone.keep_ratio_schedule).
    if with_neurons and used[:, MAX_OVER_MEAN].any():
        metrics["mone/load_entropy"] = used[:, LOAD_ENTROPY].mean().item()
        metrics["mone/dead_neuron_share"] = used[:, DEAD_SHARE].mean().item()
        metrics["mone/load_max_over_mean"] = used[:, MAX_OVER_MEAN].mean().item()
        metrics["mone/mass_kept"] = used[:, MASS_KEPT].mean().item()
    return metrics
