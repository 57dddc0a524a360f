"""Trains with our trainer's step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mone_megatron.lab.benchmarks.peers.task import Arrays, PeerTask
from mone_megatron.parallel.device import open_device, open_process_group
from mone_megatron.parallel.world import World

# Steps whose microbatches are kept in memory.
STEPS_IN_MEMORY = 4


class OurWork:
    """Trains one model as the trainer does: its step, and its auxiliary losses read."""

    def __init__(self, task: PeerTask) -> None:
        """Builds it in this process, in place of one before."""
        config = task.config
        device = open_device(config.device, World())
        # megatron-core is imported for the device by now.
        from mone_megatron.lab.benchmarks.experiments import open_experiments
        from mone_megatron.parallel.groups import close_groups
        from mone_megatron.train.hooks.auxiliary_losses import AuxiliaryLossHook

        close_groups()
        open_process_group(device, World(), timeout_seconds=600)
        self._session = open_experiments([config], steps_in_memory=STEPS_IN_MEMORY)[0]
        self._stepper = self._session.stepper()
        self._auxiliary = AuxiliaryLossHook(config, self._session.layout, device.torch_device)
        chunks = self._session.state.chunks
        self.parameters = sum(one.numel() for chunk in chunks for one in chunk.parameters())

    def step(self) -> float:
        """Trains one step and returns its loss."""
        result = self._stepper.train(self._session.next_step(), reduce=self._auxiliary.reduce)
        self._session.device.synchronize()
        return result.loss

    def batches(self) -> tuple[tuple[Arrays, ...], ...]:
        """Returns the microbatches of the steps in memory; asked before the first step."""
        return tuple(
            tuple(
                {name: _array(microbatch[name]) for name in ("tokens", "labels")}
                for microbatch in self._session.next_step()
            )
            for _ in range(STEPS_IN_MEMORY)
        )


def _array(tensor: torch.Tensor) -> NDArray[np.int64]:
    return tensor.numpy()
