from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels.reference import segment_matrix, topk_mask
from mone_megatron.mone.metrics import (
    ACTIVE,
    DEAD_SHARE,
    DENSITY,
    KEPT_ACTIVATION,
    LOAD_BALANCE,
    LOAD_ENTROPY,
    LOAD_OVERLAP,
    MASS_KEPT,
    MAX_OVER_MEAN,
    NUM_COLUMNS,
    TOKENS,
    Usage,
    expert_metrics,
    statistics,
    summarise,
)
from mone_megatron.testing.processes import Processes

CPU = torch.device("cpu")


def _usage(
    experts: int = 2,
    neuron_group: dist.ProcessGroup | None = None,
    replica_group: dist.ProcessGroup | None = None,
    first_expert: int = 0,
    num_experts: int | None = None,
) -> Usage:
    return Usage(
        num_local_experts=experts,
        first_expert=first_expert,
        num_experts=num_experts or experts,
        neuron_group=neuron_group,
        replica_group=replica_group,
    )


def _count(usage: Usage, activation: Tensor, mask: Tensor, index: Tensor) -> None:
    expert_ET = segment_matrix(index, usage.num_local_experts)
    usage.add_tokens(expert_ET.sum(-1))
    usage.add_selection(
        kept_EF=expert_ET @ mask.float(),
        activation_TF=activation,
        mask_TF=mask,
        expert_ET=expert_ET,
    )


def _table(usage: Usage) -> Tensor:
    """The statistics of one module on one rank."""
    sums = usage.sums(usage.counts(CPU))
    return statistics(sums[:, :-1], sums[:, -1])


def test_by_hand() -> None:
    # Expert 0: four tokens keep one of four neurons each: loads 2, 1, 1, 0. Expert 1: one token.
    activation = torch.tensor(
        [
            [3.0, 1.0, 0.0, 0.0],  # keeps 3 of 4
            [-2.0, 1.0, 0.0, 1.0],  # 2 of 4
            [0.0, 9.0, 1.0, 0.0],  # 9 of 10
            [0.1, 0.0, 0.1, 0.0],  # 0.1 of 0.2
            [1.0, 1.0, 1.0, -5.0],  # 5 of 8
        ]
    )
    kept = [0, 0, 1, 2, 3]
    mask = torch.eye(4).bool()[kept]
    index = torch.tensor([0, 0, 0, 0, 1])
    usage = _usage()
    _count(usage, activation, mask, index)
    table = _table(usage)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    expected = {
        TOKENS: (4, 1),
        LOAD_ENTROPY: (entropy, 0.0),
        DEAD_SHARE: (0.25, 0.75),
        MAX_OVER_MEAN: (2.0, 4.0),
        MASS_KEPT: ((0.75 + 0.5 + 0.9 + 0.5) / 4, 5 / 8),
        # f * sum of squared loads: 4 * (1/4 + 1/16 + 1/16) and 4 * 1.
        LOAD_BALANCE: (1.5, 4.0),
        KEPT_ACTIVATION: ((3 + 2 + 9 + 0.1) / 4, 5.0),
        DENSITY: (0.25, 0.25),
    }
    assert table.shape == (2, NUM_COLUMNS)
    assert table[:, LOAD_OVERLAP].isnan().all()  # nothing to compare with
    for column, values in expected.items():
        assert table[:, column].tolist() == pytest.approx(values, abs=1e-6), column

    metrics = expert_metrics(table, with_neurons=True)
    assert metrics == pytest.approx(
        {
            "router/tokens_per_expert_min": 1,
            "router/tokens_per_expert_mean": 2.5,
            "router/tokens_per_expert_max": 4,
            "router/tokens_per_expert_std": 1.5,
            "router/dead_experts": 0,
            "router/load_entropy": -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2),
            "mone/load_entropy": entropy / 2,
            "mone/load_entropy_min": 0.0,
            "mone/dead_neuron_share": 0.5,
            "mone/dead_neuron_share_max": 0.75,
            "mone/load_max_over_mean": 3.0,
            "mone/mass_kept": (0.6625 + 0.625) / 2,
            "mone/load_balance": 2.75,
            "mone/kept_activation": (3.525 + 5) / 2,
            "mone/density": 0.25,
        },
        abs=1e-6,
    )


def test_active_neurons_are_counted_where_somebody_asks() -> None:
    """Of four neurons 2, 0 and 3 have an activation; a NaN is none. A token counts like a token."""
    activation = torch.tensor(
        [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, math.nan], [0.2, -0.1, 3.0, 0.0]]
    )
    mask = torch.tensor([[True, False, False, False]] * 3)
    usage = _usage()
    usage.counts_active = True
    _count(usage, activation, mask, torch.tensor([0, 0, 1]))
    table = _table(usage)
    assert table[:, ACTIVE].tolist() == pytest.approx([2 / 8, 3 / 4])
    metrics = expert_metrics(table, with_neurons=True)
    assert metrics["mone/active_share"] == pytest.approx(5 / 12)
    plain = _usage()
    _count(plain, activation, mask, torch.tensor([0, 0, 1]))
    others = [column for column in range(NUM_COLUMNS) if column != ACTIVE]
    torch.testing.assert_close(_table(plain)[:, others], table[:, others], equal_nan=True)
    assert "mone/active_share" not in expert_metrics(_table(plain), with_neurons=True)


def test_even_load_has_entropy_one_and_no_dead_neurons() -> None:
    usage = _usage(experts=1)
    mask = torch.eye(8).bool()
    _count(usage, torch.ones(8, 8), mask, torch.zeros(8, dtype=torch.long))
    row = _table(usage)[0].tolist()
    expected = [8, 1.0, 0.0, 1.0, 1 / 8, 1.0, 1.0, 1 / 8, 0.0, math.nan]
    assert row == pytest.approx(expected, nan_ok=True)


def test_load_overlap_with_the_table_before() -> None:
    usage = _usage(experts=3)

    def count(kept: list[int], index: list[int]) -> list[float]:
        usage.reset()
        _count(usage, torch.ones(len(kept), 4), torch.eye(4).bool()[kept], torch.tensor(index))
        return _table(usage)[:, LOAD_OVERLAP].tolist()

    count([0, 1, 2, 2, 3], [0, 0, 0, 0, 1])
    # Expert 0: loads (1/4, 1/4, 1/2, 0) then (1/2, 1/2, 0, 0). Expert 1: others than before.
    # Expert 2 had no tokens before.
    assert count([0, 1, 0, 3], [0, 0, 1, 2]) == pytest.approx([0.5, 0.0, math.nan], nan_ok=True)
    # A step that is not summarised changes nothing; without tokens there is no overlap.
    usage.reset()
    usage.reset()
    overlap = count([0, 1, 1], [0, 0, 0])
    assert overlap == pytest.approx([0.5 + 0.5 - 1 / 6, math.nan, math.nan], nan_ok=True)
    metrics = expert_metrics(_table(usage), with_neurons=True)
    assert metrics["mone/load_overlap"] == pytest.approx(overlap[0])
    usage.forget()
    assert count([0], [0]) == pytest.approx([math.nan] * 3, nan_ok=True)


def test_an_expert_without_tokens_is_dead_and_left_out_of_the_means() -> None:
    usage = _usage(experts=3)
    mask = torch.eye(4).bool()
    _count(usage, torch.ones(4, 4), mask, torch.ones(4, dtype=torch.long))
    table = _table(usage)
    assert table[0, :-1].eq(0).all()
    assert table[2, :-1].eq(0).all()
    metrics = expert_metrics(table, with_neurons=True)
    assert metrics["router/dead_experts"] == 2
    assert metrics["mone/load_entropy"] == pytest.approx(1.0)
    assert metrics["mone/mass_kept"] == pytest.approx(0.25)


def test_without_neurons_only_the_router_is_described() -> None:
    usage = _usage()
    usage.add_tokens(torch.tensor([3.0, 1.0]))
    metrics = expert_metrics(_table(usage), with_neurons=False)
    assert set(metrics) == {
        *(f"router/tokens_per_expert_{part}" for part in ("min", "mean", "max", "std")),
        "router/dead_experts",
        "router/load_entropy",
    }
    assert metrics["router/tokens_per_expert_max"] == 3


def test_counts_add_up_until_reset() -> None:
    activation, mask, index = _case()
    once, twice = _usage(), _usage()
    _count(once, activation, mask, index)
    for rows in (slice(0, 7), slice(7, None)):
        _count(twice, activation[rows], mask[rows], index[rows])
    torch.testing.assert_close(_table(once), _table(twice), equal_nan=True)
    twice.reset()
    assert _table(twice)[:, :-1].eq(0).all()


@pytest.mark.usefixtures("one_process")
def test_modules_and_experts_stand_at_their_place() -> None:
    usage = _usage(first_expert=2, num_experts=6)
    usage.add_tokens(torch.tensor([3.0, 1.0]))
    tables, present = summarise({1: usage}, rows=3, num_experts=6, neuron_ranks=1, device=CPU)
    assert present.tolist() == [False, True, False]
    assert tables[1, :, TOKENS].tolist() == [0, 0, 3, 1, 0, 0]
    assert tables[[0, 2]][..., TOKENS].eq(0).all()


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    activation = torch.randn(20, 8, generator=generator)
    index = torch.randint(0, 2, (20,), generator=generator)
    return activation, topk_mask(activation.abs(), 2), index


def _twice(usage: Usage, rows: slice, neurons: slice, size: int) -> list[Tensor]:
    """Tables of two rounds of counting, the second of the first half of the tokens."""
    activation, mask, index = _case()
    tables = []
    for half in (len(index), len(index) // 2):
        usage.reset()
        part = slice(rows.start, min(rows.stop, half))
        _count(usage, activation[part, neurons], mask[part, neurons], index[part])
        table, _ = summarise({0: usage}, rows=1, num_experts=2, neuron_ranks=size, device=CPU)
        tables.append(table[0])
    return tables


def _over_neurons() -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    neurons = slice(8 // size * rank, 8 // size * (rank + 1))
    return _twice(_usage(neuron_group=dist.group.WORLD), slice(0, 20), neurons, size)


def _over_replicas() -> list[Tensor]:
    rows = slice(0, 7) if dist.get_rank() == 0 else slice(7, 20)
    return _twice(_usage(replica_group=dist.group.WORLD), rows, slice(None), 1)


def _over_experts() -> list[Tensor]:
    """Each rank has one of the two experts."""
    rank = dist.get_rank()
    activation, mask, index = _case()
    tables = []
    usage = _usage(experts=1, first_expert=rank, num_experts=2)
    for half in (len(index), len(index) // 2):
        usage.reset()
        rows = index[:half] == rank
        zeros = torch.zeros(int(rows.sum()), dtype=torch.long)
        _count(usage, activation[:half][rows], mask[:half][rows], zeros)
        table, _ = summarise({0: usage}, rows=1, num_experts=2, neuron_ranks=1, device=CPU)
        tables.append(table[0])
    return tables


@pytest.mark.parametrize("spread", [_over_neurons, _over_replicas, _over_experts])
def test_two_ranks_equal_one(
    two_processes: Processes, spread: Callable[[], list[Tensor]], one_process: None
) -> None:
    expected = _twice(_usage(), slice(0, 20), slice(None), 1)
    assert not expected[1][:, LOAD_OVERLAP].isnan().any()
    for tables in two_processes.run(spread):
        torch.testing.assert_close(tables, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
