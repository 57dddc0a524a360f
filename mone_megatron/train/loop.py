"""The training loop: batches in, records out. Everything else is a hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mone_megatron.config.schema import Config
from mone_megatron.config.validate import Layout
from mone_megatron.parallel.device import Device
from mone_megatron.planning.flops import Flops
from mone_megatron.train.evaluate.tasks import TaskEvaluation
from mone_megatron.train.health.faults import LossFaults
from mone_megatron.train.health.signals import StopRequest, exit_code
from mone_megatron.train.hooks.auxiliary_losses import AuxiliaryLosses
from mone_megatron.train.hooks.hook import Hook, Record
from mone_megatron.train.hooks.keep_ratio import KeepRatio
from mone_megatron.train.hooks.utilisation import UtilisationPanel
from mone_megatron.train.resume.checkpointer import Checkpointer, Position
from mone_megatron.train.step import Batch, Stepper


@dataclass(frozen=True)
class Outcome:
    """Where training ended."""

    position: Position
    # The exit code when it was stopped before the last step; None when it came to the end.
    exit_code: int | None
    # What stopped it, as this rank knows.
    stopped_by: str | None


def _is_due(step: int, interval: int, last: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == last)


def train(
    *,
    config: Config,
    layout: Layout,
    device: Device,
    stepper: Stepper,
    batches_from: Callable[[int], Iterator[Batch]],
    validation: Callable[[], Iterator[Batch]] | None,
    tasks: TaskEvaluation | None,
    auxiliary: AuxiliaryLosses,
    panel: UtilisationPanel,
    keep_ratio: KeepRatio,
    flops_at: Callable[[int], Flops],
    hooks: Sequence[Hook],
    stop: StopRequest,
    start: Position,
    checkpointer: Checkpointer | None,
) -> Outcome:
    """Run steps until ``train.steps`` or until any rank is asked to stop.

    Args:
        config: validated.
        layout: from validation.
        device: where to compute.
        stepper: one step.
        batches_from: this rank's microbatches of the steps after one.
        validation: the validation microbatches from their beginning, or None.
        tasks: run every ``train.eval_tasks_interval`` steps; None for none.
        auxiliary: auxiliary losses.
        panel: expert and neuron use.
        keep_ratio: of the neurons, step by step.
        flops_at: of a step.
        hooks: told of every step.
        stop: this process's request to stop; all ranks agree on it at the end of a step.
        start: where to go on from.
        checkpointer: saves every ``checkpoint.interval`` steps, at the end and when stopped; needed
            with ``train.on_bad_loss=rollback``. None for no checkpoints.

    Raises:
        FloatingPointError: for a loss, a gradient or a state that ``train.on_bad_loss`` says, or
            that its limits say, must end the run. Nothing of that step was applied or saved.
        CheckpointWriteError: a checkpoint could not be written.
    """
    last = config.train.steps
    tokens_per_step = config.train.global_batch_size * config.train.seq_length
    position, code = start, None
    batches = batches_from(start.step)
    faults = LossFaults(config.train)
    where = device.torch_device

    def extra() -> torch.Tensor:
        saving = checkpointer.read(where) if checkpointer else torch.zeros(1, device=where)
        return torch.cat([stop.read(where), saving, auxiliary.read(where)])

    while position.step < last and code is None:
        step = position.step + 1
        started = time.perf_counter()
        show_layers = _is_due(step, config.logging.layer_interval, last)
        panel.collect(show_layers)
        ratio = keep_ratio.set_for(step)
        result = stepper.attempt(
            [next(batches) for _ in range(layout.num_microbatches)],
            extra=extra,
            judge=partial(faults.judge, step),
        )
        device.synchronize()
        seconds = time.perf_counter() - started
        skipped = position.skipped
        if result.fault is None:
            faults.accept(step, result.loss)
        else:
            action = faults.decide(step, result.fault)
            for hook in hooks:
                hook.on_fault(step, result.fault, action)
            if action == "rollback":
                assert checkpointer is not None
                position = checkpointer.roll_back()
                batches = batches_from(position.step)
                panel.forget()
                faults.rolled_back(position.step)
                for hook in hooks:
                    hook.on_rollback(position.step)
                continue
            skipped += 1
        position = Position(step, position.tokens + tokens_per_step, skipped)
        rate = 1e-12 / seconds / layout.world_size
        flops = flops_at(step)
        record: Record = {
            "step": step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": position.tokens,
            "tokens_per_second": tokens_per_step / seconds,
            "step_seconds": seconds,
            "tflops_realised": flops.realised * rate,
            "tflops_ideal": flops.ideal * rate,
            **auxiliary.metrics(result.extra[3:], per_layer=show_layers),
        }
        if ratio is not None:
            record["mone/keep_ratio"] = ratio
        if checkpointer and (blocked := checkpointer.take_blocked_seconds()):
            record["checkpoint_seconds"] = blocked
        if result.fault is not None:
            record["skipped"] = 1
        if show_layers:
            counting, began = panel.counting_seconds, time.perf_counter()
            reading = panel.read(record, where)
            record |= reading.metrics
            for hook in hooks:
                hook.on_panel(reading.panel)
            record["panel_seconds"] = counting + time.perf_counter() - began
        if validation is not None and _is_due(step, config.train.eval_interval, last):
            record["val_loss"] = stepper.evaluate(validation(), config.train.eval_steps)
        if tasks is not None and _is_due(step, config.train.eval_tasks_interval, last):
            record |= tasks.run()
        for hook in hooks:
            hook.on_step(record)
        code = exit_code(result.extra[:2])
        if checkpointer is None:
            continue
        checkpointer.advance(result.extra[2:3])
        interval = config.checkpoint.interval
        if interval and (code or _is_due(step, interval, last)):
            if not stepper.state_is_finite():
                raise FloatingPointError(
                    f"step {step}: weights or moments are not finite; not saving them"
                )
            checkpointer.save(position)
    if checkpointer is not None:
        checkpointer.finish()
    return Outcome(position, code, None if code is None else stop.reason or "another rank")
