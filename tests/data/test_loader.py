from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.data.loader import MicrobatchSampler, build_loader


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, list[int], int, int]:
    """Global batch, micro batch, every data-parallel size that divides, start and end step."""
    micro = draw(st.integers(1, 4))
    microbatches = draw(st.sampled_from([1, 2, 4, 6, 12]))
    sizes = [d for d in range(1, microbatches + 1) if microbatches % d == 0]
    start = draw(st.integers(0, 5))
    return micro * microbatches, micro, sizes, start, start + draw(st.integers(0, 4))


def sampler(
    batch: int, micro: int, rank: int, size: int, start: int, end: int
) -> MicrobatchSampler:
    return MicrobatchSampler(
        global_batch_size=batch,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        start_step=start,
        end_step=end,
    )


@given(layouts())
def test_ranks_partition_every_step(layout: tuple[int, int, list[int], int, int]) -> None:
    batch, micro, sizes, start, end = layout
    for size in sizes:
        ranks = [list(sampler(batch, micro, rank, size, start, end)) for rank in range(size)]
        seen = sorted(index for rank in ranks for microbatch in rank for index in microbatch)
        assert seen == list(range(start * batch, end * batch))


@given(layouts())
def test_microbatches_are_the_same_at_every_data_parallel_size(
    layout: tuple[int, int, list[int], int, int],
) -> None:
    batch, micro, sizes, start, end = layout
    reference = list(sampler(batch, micro, 0, 1, start, end))
    for size in sizes:
        ranks = [list(sampler(batch, micro, rank, size, start, end)) for rank in range(size)]
        # Microbatch j of the run is on rank j % size, in order.
        woven = [microbatch for group in zip(*ranks, strict=True) for microbatch in group]
        assert woven == reference


@given(layouts(), st.integers(0, 4))
def test_resuming_continues_the_sequence(
    layout: tuple[int, int, list[int], int, int], stop: int
) -> None:
    batch, micro, sizes, start, end = layout
    middle = min(start + stop, end)
    before = list(sampler(batch, micro, 0, sizes[-1], start, middle))
    after = list(sampler(batch, micro, 0, sizes[-1], middle, end))
    whole = sampler(batch, micro, 0, sizes[-1], start, end)
    assert before + after == list(whole)
    assert len(whole) == len(before) + len(after)


def test_changes_of_data_parallel_size_with_kills_lose_and_repeat_nothing() -> None:
    # 1 -> 2 -> 4 -> 3 ranks at a global batch of 12, stopped after every 7 steps.
    consumed: list[int] = []
    for leg in range(20):
        size = (1, 2, 4, 3)[leg % 4]
        ranks = [list(sampler(12, 1, rank, size, leg * 7, leg * 7 + 7)) for rank in range(size)]
        per_step = len(ranks[0]) // 7
        for step in range(7):
            part = [m for rank in ranks for m in rank[step * per_step : (step + 1) * per_step]]
            consumed += sorted(index for microbatch in part for index in microbatch)
    assert consumed == list(range(20 * 7 * 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 3, 0, 1, 0, 1), "train.global_batch_size=8 is not a multiple"),
        ((8, 2, 0, 3, 0, 1), "data-parallel size 3"),
        ((8, 2, 2, 2, 0, 1), "rank 2 of 2"),
        ((8, 0, 0, 1, 0, 1), "at least 1"),
        ((8, 2, 0, 1, 3, 2), "not a range"),
    ],
)
def test_refuses(arguments: tuple[int, int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(*arguments)


class Numbers:
    """Sample i holds i everywhere."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.full((3,), index)
        return {
            "dataset_id": torch.tensor(0),
            "tokens": row,
            "labels": row + 1,
            "loss_mask": torch.ones(3),
            "position_ids": torch.arange(3),
        }


def rows(loader: Iterator[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in loader]


def test_loader_yields_batches_of_the_sampler() -> None:
    part = sampler(8, 2, 1, 2, 3, 5)
    batches = list(build_loader(Numbers(40), part))
    assert [batch["tokens"][:, 0].tolist() for batch in batches] == list(part)
    first = batches[0]
    assert set(first) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert all(value.shape == (2, 3) for value in first.values())
    assert first["loss_mask"].dtype == torch.float32
    assert first["labels"].dtype == torch.int64
    assert torch.equal(first["labels"], first["tokens"] + 1)


def test_workers_keep_the_order_and_the_random_stream() -> None:
    part = sampler(8, 2, 0, 2, 1, 6)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert rows(build_loader(Numbers(48), part, num_workers=2)) == list(part)
    assert torch.equal(torch.rand(3), expected)


def test_workers_outlive_a_sigterm_to_the_group() -> None:
    part = sampler(4, 2, 0, 1, 0, 50)
    loader = build_loader(Numbers(200), part, num_workers=1)
    first = next(loader)
    worker = loader._workers[0]  # type: ignore[attr-defined]
    # Sent by another process than the trainer, as a scheduler does.
    os.system(f"kill -TERM {worker.pid}")
    assert [first["tokens"][:, 0].tolist(), *rows(loader)] == list(part)
    # Sent by the trainer.
    loader = build_loader(Numbers(200), part, num_workers=1)
    next(loader)
    worker = loader._workers[0]  # type: ignore[attr-defined]
    # torch may report the death of the worker in the middle of the join.
    with contextlib.suppress(RuntimeError):
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(timeout=300)
    worker.join(timeout=300)
    assert worker.exitcode == 128 + signal.SIGTERM


def test_refuses_a_dataset_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="has 15 samples, step 2 needs 16"):
        build_loader(Numbers(15), sampler(8, 2, 0, 1, 0, 2))
