"""A training run in which one rank does not join a collective.

    python hanging_run.py KIND RANK STEP [OVERRIDE ...]

The collective is the sum that ends a step. KIND: "sleeps" and "spins" stay away for ever, "skips"
goes on without it, "raises" leaves the run. Everything else is the real trainer.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from torch import Tensor

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend


def stay_away(kind: str) -> None:
    while kind == "spins":
        pass
    while kind == "sleeps":
        time.sleep(3600.0)
    if kind == "raises":
        raise ArithmeticError("this rank has had enough")


def main() -> int:
    kind, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Before megatron-core is imported; see mone_megatron.pretrain.
    install_cpu_backend()
    from mone_megatron.pretrain import main as pretrain
    from mone_megatron.train.step import Stepper

    sum_over_ranks, calls = Stepper._sum_over_ranks, 0

    def faulty(self: Any, values: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == step and os.environ["RANK"] == rank:
            stay_away(kind)
            return values
        return sum_over_ranks(self, values)

    Stepper._sum_over_ranks = faulty  # type: ignore[method-assign]
    return pretrain(sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main())
