from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels.reference import segment_matrix, topk_mask
from mone_megatron.mone.metrics import (
    DEAD_SHARE,
    LOAD_ENTROPY,
    MASS_KEPT,
    MAX_OVER_MEAN,
    NUM_COLUMNS,
    TOKENS,
    Usage,
    expert_metrics,
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
    table = usage.summary(CPU)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)) / math.log(4)
    expected = {
        TOKENS: (4, 1),
        LOAD_ENTROPY: (entropy, 0.0),
        DEAD_SHARE: (0.25, 0.75),
        MAX_OVER_MEAN: (2.0, 4.0),
        MASS_KEPT: ((0.75 + 0.5 + 0.9 + 0.5) / 4, 5 / 8),
    }
    assert table.shape == (2, NUM_COLUMNS)
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
            "mone/load_entropy": entropy / 2,
            "mone/dead_neuron_share": 0.5,
            "mone/load_max_over_mean": 3.0,
            "mone/mass_kept": (0.6625 + 0.625) / 2,
        },
        abs=1e-6,
    )


def test_even_load_has_entropy_one_and_no_dead_neurons() -> None:
    usage = _usage(experts=1)
    mask = torch.eye(8).bool()
    _count(usage, torch.ones(8, 8), mask, torch.zeros(8, dtype=torch.long))
    row = usage.summary(CPU)[0].tolist()
    assert row == pytest.approx([8, 1.0, 0.0, 1.0, 1 / 8])


def test_an_expert_without_tokens_is_dead_and_left_out_of_the_means() -> None:
    usage = _usage(experts=3)
    mask = torch.eye(4).bool()
    _count(usage, torch.ones(4, 4), mask, torch.ones(4, dtype=torch.long))
    table = usage.summary(CPU)
    assert table[0].eq(0).all()
    assert table[2].eq(0).all()
    metrics = expert_metrics(table, with_neurons=True)
    assert metrics["router/dead_experts"] == 2
    assert metrics["mone/load_entropy"] == pytest.approx(1.0)
    assert metrics["mone/mass_kept"] == pytest.approx(0.25)


def test_without_neurons_only_the_router_is_described() -> None:
    usage = _usage()
    usage.add_tokens(torch.tensor([3.0, 1.0]))
    metrics = expert_metrics(usage.summary(CPU), with_neurons=False)
    assert set(metrics) == {
        *(f"router/tokens_per_expert_{part}" for part in ("min", "mean", "max", "std")),
        "router/dead_experts",
    }
    assert metrics["router/tokens_per_expert_max"] == 3


def test_counts_add_up_until_reset() -> None:
    activation, mask, index = _case()
    once, twice = _usage(), _usage()
    _count(once, activation, mask, index)
    for rows in (slice(0, 7), slice(7, None)):
        _count(twice, activation[rows], mask[rows], index[rows])
    torch.testing.assert_close(once.summary(CPU), twice.summary(CPU))
    twice.reset()
    assert twice.summary(CPU).eq(0).all()


def test_local_experts_stand_at_their_global_place() -> None:
    usage = _usage(first_expert=2, num_experts=6)
    usage.add_tokens(torch.tensor([3.0, 1.0]))
    assert usage.summary(CPU)[:, TOKENS].tolist() == [0, 0, 3, 1, 0, 0]


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    activation = torch.randn(20, 8, generator=generator)
    index = torch.randint(0, 2, (20,), generator=generator)
    return activation, topk_mask(activation.abs(), 2), index


def _over_neurons() -> Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    activation, mask, index = _case()
    usage = _usage(neuron_group=dist.group.WORLD)
    _count(usage, activation.chunk(size, -1)[rank], mask.chunk(size, -1)[rank], index)
    return usage.summary(CPU)


def _over_replicas() -> list[Tensor]:
    rank = dist.get_rank()
    activation, mask, index = _case()
    rows = slice(0, 13) if rank == 0 else slice(13, None)
    usage = _usage(replica_group=dist.group.WORLD)
    _count(usage, activation[rows], mask[rows], index[rows])
    # Twice: reading must not change the counts.
    return [usage.summary(CPU), usage.summary(CPU)]


def test_two_ranks_equal_one(two_processes: Processes) -> None:
    usage = _usage()
    _count(usage, *_case())
    expected = usage.summary(CPU)
    for table in two_processes.run(_over_neurons):
        torch.testing.assert_close(table, expected, rtol=1e-6, atol=1e-6)
    for tables in two_processes.run(_over_replicas):
        for table in tables:
            torch.testing.assert_close(table, expected, rtol=1e-6, atol=1e-6)
