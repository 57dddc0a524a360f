"""The training loop: batches in, records out. Everything else is a hook."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mone_megatron.methods.hook import Record, StepReport
from mone_megatron.train.health.faults import LossFaults
from mone_megatron.train.health.signals import exit_code
from mone_megatron.train.resume.checkpointer import Position
from mone_megatron.train.session import Session
from mone_megatron.train.step import StepResult

# What the loop itself sums over ranks; a hook's sums are under its place among the hooks.
_STOP = (-1, "stop")


@dataclass(frozen=True)
class Outcome:
    """Says where training ended.

    Attributes:
        position: after the last step.
        exit_code: when it was stopped before the last step; None when it came to the end.
        stopped_by: what stopped it, as this rank knows.
    """

    position: Position
    exit_code: int | None
    stopped_by: str | None


def train(session: Session) -> Outcome:
    """Runs steps until ``train.steps`` or until any rank is asked to stop.

    Args:
        session: with its hooks started.

    Raises:
        FloatingPointError: for a loss, a gradient or a state that ``train.on_bad_loss`` says, or
            that its limits say, must end the run. Nothing of that step was applied or saved.
        CheckpointWriteError: a checkpoint could not be written.
    """
    hooks, last = session.hooks, session.config.train.steps
    position, code = session.start, None
    batches = session.batches_from(position.step)
    faults = LossFaults(session.config.train)
    if session.config.train.eval_at_start and position.step == 0:
        _record_start(session)
    while position.step < last and code is None:
        step = position.step + 1
        started = time.perf_counter()
        for hook in hooks:
            hook.before_step(step)
        result = session.stepper.attempt(
            [next(batches) for _ in range(session.layout.num_microbatches)],
            reduce=partial(_reduce, session),
            judge=partial(faults.judge, step),
        )
        session.device.synchronize()
        seconds = time.perf_counter() - started
        if result.fault is None:
            faults.accept(step, result.loss)
        else:
            action = faults.decide(step, result.fault)
            for hook in hooks:
                hook.on_fault(step, result.fault, action)
            if action == "rollback":
                assert session.checkpointer is not None
                position = session.checkpointer.roll_back()
                batches = session.batches_from(position.step)
                faults.rolled_back(position.step)
                for hook in hooks:
                    hook.on_rollback(position.step)
                continue
        position = _after(position, session, applied=result.fault is None)
        code = exit_code(result.sums[_STOP])
        _record(session, result, position, seconds, stops=code is not None)
    return Outcome(position, code, None if code is None else session.stop.reason or "another rank")


def _record_start(session: Session) -> None:
    """Has the hooks look at the model before its first step, and tells them what they found."""
    record: Record = {"step": 0, "tokens": 0}
    for hook in session.hooks:
        record |= hook.record_start()
    for hook in session.hooks:
        hook.on_start_record(record)


def _reduce(session: Session) -> dict[tuple[int, str], Tensor]:
    """Returns what this rank adds to the collective of a step, by who asked for it and its name."""
    sums = {_STOP: session.stop.read(session.device.torch_device)}
    for place, hook in enumerate(session.hooks):
        sums |= {(place, name): value for name, value in hook.reduce().items()}
    return sums


def _after(position: Position, session: Session, *, applied: bool) -> Position:
    train = session.config.train
    return Position(
        position.step + 1,
        position.tokens + train.global_batch_size * train.seq_length,
        position.skipped + (0 if applied else 1),
    )


def _record(
    session: Session, result: StepResult, position: Position, seconds: float, *, stops: bool
) -> None:
    """Has the hooks make the record of a step, and tells them of it."""
    record: Record = {
        "step": position.step,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": position.tokens,
    }
    if result.fault is not None:
        record["skipped"] = 1

    # The record grows while they are asked; each is given its own sums.
    reports = [
        StepReport(
            step=position.step,
            seconds=seconds,
            loss=result.loss,
            grad_norm=result.grad_norm,
            tokens=position.tokens,
            skipped=position.skipped,
            fault=result.fault,
            stops=stops,
            sums={name: value for (at, name), value in result.sums.items() if at == place},
            record=record,
        )
        for place in range(len(session.hooks))
    ]
    for hook, report in zip(session.hooks, reports, strict=True):
        record |= hook.record(report)
    for hook in session.hooks:
        hook.on_step(record)
    for hook, report in zip(session.hooks, reports, strict=True):
        hook.after_step(report)
