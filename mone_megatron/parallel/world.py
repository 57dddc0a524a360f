"""Tells this process's place among those of a run, without torch, so that it is known at once."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Describes this process among those of the run, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # What the processes that were launched together share; empty for a single one.
    job: str = ""
    # SLURM's id of its job, which a requeued job keeps; empty without SLURM.
    allocation: str = ""

    @classmethod
    def from_environment(cls) -> World:
        """Reads torchrun's variables; without any it is one process.

        Raises:
            ValueError: when only some of them are set, or one is not a number.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        found = {name: os.environ[name] for name in names if name in os.environ}
        allocation = os.environ.get("SLURM_JOB_ID", "")
        if not found:
            return cls(allocation=allocation)
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"environment: {', '.join(found)} set but not {', '.join(missing)}; start with "
                "torchrun, or unset them to run one process"
            )
        try:
            numbers = [int(found[name]) for name in names]
        except ValueError:
            raise ValueError(f"environment: {found} are not all whole numbers") from None
        launch = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        job = " ".join(os.environ[name] for name in launch if name in os.environ)
        rank, size, local_rank, local_size = numbers
        return cls(rank, size, local_rank, local_size, job=job, allocation=allocation)
