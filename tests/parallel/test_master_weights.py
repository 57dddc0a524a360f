"""No fp32 parameter is copied onto itself after a step."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer


class _Copies(TorchDispatchMode):
    """Counts copies, and those of memory onto itself."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.onto_itself = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten.copy_.default:
            self.all += 1
            self.onto_itself += args[0].data_ptr() == args[1].data_ptr()
        return func(*args, **(kwargs or {}))


def _copies(dtype: torch.dtype) -> tuple[_Copies, _Copies]:
    """Counts what megatron-core's copy of masters does, and what it does here."""
    trainer = build_trainer(["experiment=tiny_mone"], data_fingerprint="random tokens", dtype=dtype)
    optimizer = trainer.state.optimizer
    assert isinstance(optimizer, ChainedOptimizer)
    copy = DistributedOptimizer._copy_main_params_to_model_params
    counts = _Copies(), _Copies()
    for count, function in zip(counts, (copy.__wrapped__, copy), strict=True):
        with count:
            for one in optimizer.chained_optimizers:
                function(one)
    return counts


def test_fp32_parameters_are_their_own_masters(four_processes: Processes) -> None:
    for upstream, here in four_processes.run(_copies, torch.float32):
        # Fails when megatron-core copies no parameter onto itself: the workaround can go then.
        assert upstream.onto_itself == upstream.all > 0
        assert here.all == 0


def test_other_parameters_are_copied(four_processes: Processes) -> None:
    for upstream, here in four_processes.run(_copies, torch.bfloat16):
        assert here.all == upstream.all > 0
        assert here.onto_itself == 0
