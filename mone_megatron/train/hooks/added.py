"""The hooks that ``train.hooks`` names, and a wall around them: their mistakes are named.

A rank that gives other numbers than the others would have the collective of a step add up what
does not belong together, or never end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.methods.hooks import HOOKS
from mone_megatron.train.session import Session


class AddedHook(Hook):
    """Passes everything on to a hook that ``train.hooks`` names, and checks what it gives."""

    def __init__(self, name: str, hook: Hook) -> None:
        """Takes a hook.

        Args:
            name: as the configuration has it.
            hook: made of this run.
        """
        self.name = name
        self.hook = hook
        # Names and shapes of what it sums over ranks; known after the first step.
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def on_start(self) -> None:
        """Passes on."""
        self.hook.on_start()

    def record_start(self) -> Record:
        """Returns what the hook records of the beginning.

        Raises:
            ValueError: it is no number.
        """
        record = self.hook.record_start()
        self._check_numbers(record)
        return record

    def on_start_record(self, record: Record) -> None:
        """Passes on a copy."""
        self.hook.on_start_record(dict(record))

    def before_step(self, step: int) -> None:
        """Passes on."""
        self.hook.before_step(step)

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns the hook's numbers, as tensors.

        The first time it is collective over all ranks: they compare names and shapes.

        Raises:
            ValueError: something is no number or tensor; ranks differ; or names or shapes are other
                ones than in the step before.
        """
        values = {name: self._tensor(name, value) for name, value in self.hook.reduce().items()}
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if self._shapes is None:
            self._compare(shapes)
            self._shapes = shapes
        # In order: the ranks' numbers lie behind one another.
        if list(shapes.items()) != list(self._shapes.items()):
            raise ValueError(
                f"train.hooks: {self.name} sums {shapes} over ranks after {self._shapes} in the "
                "step before; have its reduce() give the same names and shapes in every step"
            )
        return values

    def record(self, report: StepReport) -> Record:
        """Returns what the hook records.

        Raises:
            ValueError: it is no number, or its name is taken.
        """
        record = self.hook.record(report)
        for name in record:
            if name in report.record:
                raise ValueError(
                    f"train.hooks: {self.name} records {name!r}, which is there; rename it"
                )
        self._check_numbers(record)
        return record

    def _check_numbers(self, record: Record) -> None:
        for name, value in record.items():
            if not isinstance(value, int | float):
                raise ValueError(
                    f"train.hooks: {self.name} records {name!r} as {type(value).__name__}; give a "
                    "number, as float(value)"
                )

    def on_step(self, record: Record) -> None:
        """Passes on a copy, since other hooks are given the record, too."""
        self.hook.on_step(dict(record))

    def after_step(self, report: StepReport) -> None:
        """Passes on."""
        self.hook.after_step(report)

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Passes on."""
        self.hook.on_fault(step, fault, action)

    def on_rollback(self, step: int) -> None:
        """Passes on."""
        self.hook.on_rollback(step)

    def on_end(self, status: str) -> None:
        """Passes on."""
        self.hook.on_end(status)

    def state(self) -> dict[str, Any]:
        """Returns what checkpoints hold of the hook."""
        return self.hook.state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Passes on."""
        self.hook.set_state(state)

    def _tensor(self, name: str, value: object) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, int | float):
            return torch.tensor(float(value))
        raise ValueError(
            f"train.hooks: {self.name} sums {name!r} over ranks, of type "
            f"{type(value).__name__}; have its reduce() give tensors or numbers"
        )

    def _compare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuses names or shapes that differ between ranks. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, list(shapes.items()))
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise ValueError(
                    f"train.hooks: {self.name} sums {dict(other)} over ranks on rank {rank} and "
                    f"{dict(everyone[0])} on rank 0; have its reduce() give the same names and "
                    "shapes on every rank"
                )


def added_hooks(session: Session) -> list[AddedHook]:
    """Returns the hooks of ``train.hooks``, in their order.

    Those that have a state go on with that of the checkpoint which the run goes on from.
    """
    hooks = [AddedHook(name, HOOKS[name].make(session)) for name in session.config.train.hooks]
    if session.checkpointer is not None:
        for hook in hooks:
            session.checkpointer.keep(hook.name, hook)
    return hooks
