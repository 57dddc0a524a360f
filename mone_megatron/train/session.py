"""What training needs: everything that a step and the hooks of a run are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook
from mone_megatron.parallel.device import Device
from mone_megatron.train.health.signals import StopRequest
from mone_megatron.train.resume.checkpointer import Checkpointer, Position
from mone_megatron.train.state import TrainingState
from mone_megatron.train.step import Batch, Stepper


@dataclass(frozen=True)
class Session:
    """Holds a run that is ready to train. Process groups are megatron-core's ``parallel_state``.

    Attributes:
        config: validated.
        layout: from validation.
        device: where to compute.
        vocab_size: the tokenizer's, unpadded.
        state: this rank's part of the model, the optimizer and the learning-rate schedule.
        stepper: computes one step of the state.
        batches_from: gives this rank's microbatches of the steps after one.
        validation: gives its validation microbatches, from their beginning; None for none.
        start: where to go on from.
        stop: this process's request to stop; all ranks agree on it at the end of a step.
        checkpointer: saves, and goes back with ``train.on_bad_loss=rollback``; None for no
            checkpoints.
        hooks: are told of every step, in their order. Those that have numbers to sum over ranks
            are the same on every rank.
    """

    config: Config
    layout: Layout
    device: Device
    vocab_size: int
    state: TrainingState
    stepper: Stepper
    batches_from: Callable[[int], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]] | None = None
    start: Position = field(default_factory=Position)
    stop: StopRequest = field(default_factory=StopRequest)
    checkpointer: Checkpointer | None = None
    hooks: list[Hook] = field(default_factory=list)
