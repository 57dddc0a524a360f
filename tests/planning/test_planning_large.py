"""Layouts of a thousand ranks and more, built for real on meta tensors in a fake process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fake_world.py")


@pytest.mark.parametrize(
    ("rank", "world_size", "overrides"),
    [
        # In the first stage gradients are reduced in buckets; experts are split over tensors, too.
        (
            201,
            1024,
            [
                "experiment=mixtral_8x7b_mone",
                "train.global_batch_size=1024",
                "parallel.expert_tensor=2",
                "parallel.expert=4",
                "model.tie_embeddings=true",
            ],
        ),
        # The last rank holds what is left; the last stage holds the output layer.
        (
            1023,
            1024,
            [
                "experiment=qwen3_30b_a3b_mone",
                "train.global_batch_size=1024",
                "parallel.virtual_pipeline=2",
            ],
        ),
        (8191, 16384, ["experiment=qwen3_30b_a3b_mone", "train.global_batch_size=4096"]),
        pytest.param(
            9001,
            16384,
            ["experiment=mixtral_8x7b_moe", "train.global_batch_size=4096"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_rank_of_a_large_run_holds_what_is_planned(
    rank: int, world_size: int, overrides: list[str]
) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(rank), str(world_size), *overrides],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"rank {rank} of {world_size}")
