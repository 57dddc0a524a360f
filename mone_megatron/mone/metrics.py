"""Counts how experts and their neurons are used while training, then gives a few numbers each.

A :class:`Usage` belongs to one module that selects neurons (or routes tokens) and counts only
while ``collecting`` is set, so that its cost is paid on the steps that log it. :func:`summarise`
adds the counts of all layers over all ranks, in two collectives.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, E experts on this rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# Statistics of an expert, the columns of summarise's tables.
(
    TOKENS,
    LOAD_ENTROPY,
    DEAD_SHARE,
    MAX_OVER_MEAN,
    MASS_KEPT,
    LOAD_BALANCE,
    KEPT_ACTIVATION,
    DENSITY,
    ACTIVE,
    LOAD_OVERLAP,
) = range(10)
NUM_COLUMNS = 10
# What the statistics are made of, sums over all ranks: tokens, shares of mass, mass, active
# neurons, kept neurons, c log c and c squared of the counts c, dead neurons, neurons, load in
# common with the one before.
_NUM_SUMS = 10
# The first of them describe the expert as a whole, and not this rank's neurons.
_NUM_WHOLE = 5


class Usage:
    """Counts how one module's experts on this rank are used, from :meth:`reset` on."""

    def __init__(
        self,
        *,
        num_local_experts: int,
        first_expert: int,
        num_experts: int,
        neuron_group: dist.ProcessGroup | None,
        replica_group: dist.ProcessGroup | None,
    ) -> None:
        """Starts with nothing counted.

        Args:
            num_local_experts: E, experts on this rank.
            first_expert: the global index of the first of them.
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
        # Whether active neurons, whose activation is not zero, are counted beside the kept ones.
        self.counts_active = False
        # Loads over all replicas [E, F] and whether an expert had any [E]: as they were summarised
        # last, and before that.
        self._loads: tuple[Tensor, Tensor] | None = None
        self._loads_before: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Counts anew; what was summarised is what the next summary is compared with."""
        self.tokens_E: Tensor | None = None
        self.kept_EF: Tensor | None = None
        self.whole_E4: Tensor | None = None
        self.seconds = 0.0
        if self._loads is not None:
            self._loads_before, self._loads = self._loads, None

    def forget(self) -> None:
        """Forgets what the next summary would be compared with, since training went back."""
        self._loads = self._loads_before = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the wall-clock time of what is done meanwhile to ``seconds``.

        On a GPU that is the time to launch it, not to run it.
        """
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def add_tokens(self, tokens_E: Tensor) -> None:
        """Counts the tokens of one forward pass."""
        tokens_E = tokens_E.float()
        self.tokens_E = tokens_E if self.tokens_E is None else self.tokens_E + tokens_E

    def add_selection(
        self, *, kept_EF: Tensor, activation_TF: Tensor, mask_TF: Tensor, expert_ET: Tensor
    ) -> None:
        """Counts the kept neurons of one forward pass, their sum of |a| and its share of all |a|.

        Args:
            kept_EF: tokens that keep each neuron, fp32.
            activation_TF: a = SiLU(g).
            mask_TF: bool, True at kept neurons.
            expert_ET: fp32, 1 where row t belongs to expert e.
        """
        mass_TF = activation_TF.detach().float().abs()
        sums_T2 = torch.stack([(mass_TF * mask_TF).sum(dim=-1), mass_TF.sum(dim=-1)], dim=-1)
        total_E = kept_EF.sum(dim=-1)
        active_E = torch.zeros_like(total_E)
        if self.counts_active:
            active_E = expert_ET @ (mass_TF > 0).sum(dim=-1).float()
        neurons_2E = torch.stack([active_E, total_E])
        if self.neuron_group is not None:
            parts = (sums_T2, neurons_2E)
            sums = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(sums, group=self.neuron_group)
            sums_T2, neurons_2E = (
                summed.view_as(part)
                for summed, part in zip(
                    sums.split([part.numel() for part in parts]), parts, strict=True
                )
            )
        kept_T, all_T = sums_T2.unbind(dim=-1)
        share_T = kept_T / all_T.clamp_min(torch.finfo(torch.float32).tiny)
        mass_E2 = expert_ET @ torch.stack([share_T, kept_T], dim=-1)
        whole_E4 = torch.cat([mass_E2, neurons_2E.T], dim=-1)
        self.kept_EF = kept_EF if self.kept_EF is None else self.kept_EF + kept_EF
        self.whole_E4 = whole_E4 if self.whole_E4 is None else self.whole_E4 + whole_E4

    def counts(self, device: torch.device) -> Tensor:
        """Returns everything counted here, flat and fp64, as :meth:`sums` takes it."""
        tokens_E = self.tokens_E
        if tokens_E is None:
            tokens_E = torch.zeros(self.num_local_experts)
        parts = [tokens_E.unsqueeze(-1)]
        if self.kept_EF is not None and self.whole_E4 is not None:
            parts += [self.whole_E4, self.kept_EF]
        return torch.cat([part.to(device, torch.float64) for part in parts], dim=-1).flatten()

    def sums(self, counts: Tensor) -> Tensor:
        """Returns what the statistics are made of, for this rank's experts and neurons.

        The next call compares its loads with those of this one.

        Args:
            counts: :meth:`counts`, added over the replicas.

        Returns:
            ``[E, _NUM_SUMS + 1]`` fp64. All columns but the last add up over the ranks of
            ``neuron_group``; the last is the largest load of a neuron.
        """
        by_expert = counts.view(self.num_local_experts, -1)
        whole, kept_EF = by_expert[:, :_NUM_WHOLE], by_expert[:, _NUM_WHOLE:]
        sums = counts.new_zeros(self.num_local_experts, _NUM_SUMS + 1)
        if self.neuron_group is None or dist.get_rank(self.neuron_group) == 0:
            sums[:, : whole.shape[-1]] = whole
        if whole.shape[-1] < _NUM_WHOLE:  # nothing was selected
            return sums
        load_EF = kept_EF / whole[:, -1:].clamp_min(1)
        common_E = torch.full_like(load_EF[:, 0], torch.nan)
        if self._loads_before is not None:
            before_EF, used_before_E = self._loads_before
            common_E = torch.minimum(load_EF, before_EF).sum(dim=-1)
            common_E[~used_before_E] = torch.nan
        columns = [
            torch.xlogy(kept_EF, kept_EF).sum(dim=-1),
            kept_EF.square().sum(dim=-1),
            (kept_EF == 0).sum(dim=-1).double(),
            torch.full_like(common_E, kept_EF.shape[-1]),
            common_E,
            kept_EF.amax(dim=-1),
        ]
        sums[:, _NUM_WHOLE:] = torch.stack(columns, dim=-1)
        self._loads = (load_EF, whole[:, -1] > 0)
        return sums


def summarise(
    usages: Mapping[int, Usage],
    *,
    rows: int,
    num_experts: int,
    neuron_ranks: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns the statistics of all modules of one kind. Collective over all ranks; equal on each.

    Two collectives (one where nothing is replicated): counts over the replicas, then what the
    statistics are made of over all ranks.

    Args:
        usages: this rank's counts, each at its row; all of the same groups.
        rows: how many rows the tables have, over all ranks.
        num_experts: the experts of a module, over all ranks.
        neuron_ranks: ranks that share the neurons of an expert.
        device: the device on which the counts are added up.

    Returns:
        ``[rows, num_experts, NUM_COLUMNS]`` fp64 on the CPU, see :func:`statistics`; and
        ``[rows]`` bool, whether any rank has the module.
    """
    # The last column: whether the module is there. Before it, a place for each neuron rank.
    sums = torch.zeros(
        rows, num_experts, _NUM_SUMS + neuron_ranks + 1, dtype=torch.float64, device=device
    )
    if usages:
        parts = [usage.counts(device) for usage in usages.values()]
        counts = torch.cat(parts)
        one = next(iter(usages.values()))
        first_replica = True
        if one.replica_group is not None:
            dist.all_reduce(counts, group=one.replica_group)
            first_replica = dist.get_rank(one.replica_group) == 0
        neuron_rank = 0 if one.neuron_group is None else dist.get_rank(one.neuron_group)
        split = counts.split([len(part) for part in parts])
        for (row, usage), part in zip(usages.items(), split, strict=True):
            local = usage.sums(part)
            if first_replica:
                here = sums[row, usage.first_expert : usage.first_expert + usage.num_local_experts]
                here[:, :_NUM_SUMS] = local[:, :-1]
                here[:, _NUM_SUMS + neuron_rank] = local[:, -1]
                here[:, -1] = 1
    dist.all_reduce(sums)
    sums = sums.cpu()
    largest = sums[..., _NUM_SUMS:-1].amax(dim=-1)
    return statistics(sums[..., :_NUM_SUMS], largest), sums[..., -1].amax(dim=-1) > 0


def statistics(sums: Tensor, largest: Tensor) -> Tensor:
    """Returns ``[..., NUM_COLUMNS]`` of sums ``[..., _NUM_SUMS]`` and the largest loads ``[...]``.

    Columns: tokens; entropy of the neuron load over log f; share of neurons never kept; largest
    over mean load; share of |a| mass kept; f times the sum of squared loads (the balance loss were
    all weights equal: 1 when even); mean |a| of the kept neurons; share of its neurons that a token
    keeps; share of those whose activation is not zero, 0 where nobody counts them; overlap of the
    load with that of the summary before (sum of the smaller shares). All but the first are 0 for an
    expert without tokens or without selection; the last is NaN there and where there is nothing to
    compare with.
    """
    tokens, shares, mass, active, kept = sums[..., :_NUM_WHOLE].unbind(dim=-1)
    kept_log, kept_squared, dead, neurons, common = sums[..., _NUM_WHOLE:].unbind(dim=-1)
    used = (kept > 0).double()
    total = kept.clamp_min(1)
    neurons = neurons.clamp_min(1)
    # H(c / total) = log total - sum c log c / total.
    entropy = total.log() - kept_log / total
    columns = [
        tokens,
        used * entropy / neurons.log().clamp_min(1e-12),
        used * dead / neurons,
        largest * neurons / total,
        shares / tokens.clamp_min(1),
        neurons * kept_squared / total.square(),
        mass / total,
        kept / (tokens.clamp_min(1) * neurons),
        active / (tokens.clamp_min(1) * neurons),
        common.where(kept > 0, torch.nan),
    ]
    return torch.stack(columns, dim=-1)


def expert_metrics(table: Tensor, *, with_neurons: bool) -> dict[str, float]:
    """Returns the numbers of one layer, of its table (:func:`summarise`).

    Args:
        table: ``[num_experts, NUM_COLUMNS]`` fp64.
        with_neurons: whether the layer may select neurons.

    Returns:
        ``router/tokens_per_expert_{min,mean,max,std}``, ``router/dead_experts`` and
        ``router/load_entropy`` (with several experts); with neurons ``mone/load_entropy``,
        ``mone/dead_neuron_share``, ``mone/load_max_over_mean``, ``mone/mass_kept``,
        ``mone/load_balance``, ``mone/kept_activation`` and, after the first time,
        ``mone/load_overlap``: means over the experts that had tokens; ``mone/density``, the mean
        over tokens of the share of neurons that is kept, and, where they are counted,
        ``mone/active_share``, of those whose activation is not zero; and of the worst expert
        ``mone/load_entropy_min`` and ``mone/dead_neuron_share_max``.
    """
    tokens = table[:, TOKENS]
    metrics = {
        "router/tokens_per_expert_min": tokens.min().item(),
        "router/tokens_per_expert_mean": tokens.mean().item(),
        "router/tokens_per_expert_max": tokens.max().item(),
        "router/tokens_per_expert_std": tokens.std(correction=0).item(),
        "router/dead_experts": float((tokens == 0).sum()),
    }
    if len(tokens) > 1:
        shares = tokens / tokens.sum().clamp_min(1)
        entropy = -torch.xlogy(shares, shares).sum()
        metrics["router/load_entropy"] = entropy.item() / math.log(len(tokens))
    used = table[tokens > 0]
    # All 0 where nothing was selected, since all neurons were kept (mone.keep_ratio_schedule).
    if with_neurons and used[:, MAX_OVER_MEAN].any():
        metrics["mone/load_entropy"] = used[:, LOAD_ENTROPY].mean().item()
        metrics["mone/load_entropy_min"] = used[:, LOAD_ENTROPY].min().item()
        metrics["mone/dead_neuron_share"] = used[:, DEAD_SHARE].mean().item()
        metrics["mone/dead_neuron_share_max"] = used[:, DEAD_SHARE].max().item()
        metrics["mone/load_max_over_mean"] = used[:, MAX_OVER_MEAN].mean().item()
        metrics["mone/mass_kept"] = used[:, MASS_KEPT].mean().item()
        metrics["mone/load_balance"] = used[:, LOAD_BALANCE].mean().item()
        metrics["mone/kept_activation"] = used[:, KEPT_ACTIVATION].mean().item()
        # Of all rows of the layer, so that an expert counts by its tokens: what a token computes.
        rows = used[:, TOKENS]
        metrics["mone/density"] = ((used[:, DENSITY] * rows).sum() / rows.sum()).item()
        if used[:, ACTIVE].any():
            metrics["mone/active_share"] = ((used[:, ACTIVE] * rows).sum() / rows.sum()).item()
        overlap = used[:, LOAD_OVERLAP]
        if len(compared := overlap[~overlap.isnan()]):
            metrics["mone/load_overlap"] = compared.mean().item()
    return metrics
