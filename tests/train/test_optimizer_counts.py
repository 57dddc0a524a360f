"""How many updates there were is known again after a resume, wherever an optimizer counts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core.optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches
from mone_megatron.train.resume.checkpointer import Position
from mone_megatron.train.resume.saved_state import inner_parts

TINY = ("experiment=tiny_mone", "device=cpu", "model.num_layers=1", "train.seq_length=16")


class GroupAdam(torch.optim.Optimizer):
    """AdamW that counts updates once for a group, from the first on, as Transformer Engine's."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
                grad = parameter.grad.float()
                state["exp_avg"].lerp_(grad, 1 - first)
                state["exp_avg_sq"].lerp_(grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * mean / (scale + group["eps"]))


class TensorGroupAdam(GroupAdam):
    """Counts in a tensor, as Transformer Engine's does for CUDA graphs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for group in self.param_groups:
            group["step"] = torch.zeros(1, dtype=torch.int32)


# None: torch's, which megatron-core takes without Transformer Engine.
ADAMS = {"torch": None, "group": GroupAdam, "tensor": TensorGroupAdam}


@contextmanager
def _using(adam: str) -> Iterator[None]:
    """Within the block megatron-core finds this Adam, as it finds Transformer Engine's."""
    found = ADAMS[adam]
    if found is None:
        yield
        return
    changes = {"Adam": found, "USING_PYTORCH_OPTIMIZER": False}
    with (
        patch.multiple(megatron.core.optimizer, **changes),
        patch.object(distrib_optimizer, "Adam", found),
    ):
        yield


def _trainer(folder: str, overrides: tuple[str, ...]) -> Trainer:
    settings = (*TINY, *overrides, f"run.dir={folder}", "checkpoint.resume=auto")
    return build_trainer(settings, data_fingerprint="none")


def _train(trainer: Trainer) -> list[float]:
    return [trainer.stepper.train(random_batches(trainer)).loss for _ in range(3)]


def save_and_go_on(adam: str, folder: str, overrides: tuple[str, ...]) -> list[float]:
    """Returns the losses of three steps after three others and a save."""
    with _using(adam):
        trainer = _trainer(folder, overrides)
        for part in inner_parts(trainer.state.optimizer):
            assert type(part.optimizer) is (ADAMS[adam] or torch.optim.AdamW)
        _train(trainer)
        trainer.checkpointer.save(Position(step=3, tokens=1))
        trainer.checkpointer.finish()
        return _train(trainer)


def resume(adam: str, folder: str, overrides: tuple[str, ...]) -> list[float]:
    """Returns the losses of the three steps after that save."""
    with _using(adam):
        trainer = _trainer(folder, overrides)
        assert trainer.checkpointer.resume().step == 3
        return _train(trainer)


@pytest.mark.parametrize("adam", ADAMS)
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_resumed_run_goes_on_bit_for_bit(
    two_processes: Processes, tmp_path: Path, adam: str, distributed: str
) -> None:
    setting = adam, str(tmp_path), (f"parallel.distributed_optimizer={distributed}",)
    going_on = two_processes.run(save_and_go_on, *setting)
    assert two_processes.run(resume, *setting) == going_on
