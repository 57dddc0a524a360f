"""Measures what the trainer adds to a bare loop over the same megatron-core objects."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from mone_megatron.config.schema import Config
from mone_megatron.lab.benchmarks.experiments import OpenExperiment, open_experiments
from mone_megatron.lab.benchmarks.measure import Spread, interleave, ratio
from mone_megatron.parallel.groups import close_groups
from mone_megatron.train.hooks.console import ConsoleHook
from mone_megatron.train.hooks.metrics_file import MetricsFileHook
from mone_megatron.train.hooks.on_every_rank import hooks_on_every_rank
from mone_megatron.train.loop import train
from mone_megatron.train.session import Session
from mone_megatron.train.step import Batch


@dataclass(frozen=True)
class SpineCost:
    """Holds what the trainer costs, as measured on one rank."""

    hardware: str
    # Tokens per second through the trainer over those of the bare loop.
    throughput_ratio: Spread
    # The same by processor time: of use when other processes take the cores.
    processor_ratio: Spread
    trainer_tokens_per_second: Spread
    bare_tokens_per_second: Spread


def measure_spine(config: Config, *, repeats: int, steps: int) -> SpineCost:
    """Trains with the loop, its metrics file and its progress lines, and with a bare loop.

    Each trains its own copy of the model, on the same microbatches in the same order. Collective
    over the default process group.

    Args:
        config: from :func:`mone_megatron.lab.benchmarks.ranks.prepare`.
        repeats: measurements of each.
        steps: steps in one measurement.
    """
    config = replace(config, train=replace(config.train, steps=steps))
    ours, bare = open_experiments([config, config], steps_in_memory=4)
    bare.stepper()  # sets megatron-core's gradient hooks on the model's configuration
    session = Session(
        config=config,
        layout=ours.layout,
        device=ours.device,
        vocab_size=ours.data.vocab_size,
        state=ours.state,
        stepper=ours.stepper(),
        batches_from=lambda step: ours.batches,
    )
    with tempfile.TemporaryDirectory() as folder:
        shown = [ConsoleHook(config, stream=io.StringIO()), MetricsFileHook(Path(folder))]
        session.hooks.extend([*hooks_on_every_rank(session), *shown])

        def trainer() -> None:
            for hook in session.hooks:
                hook.on_start()
            train(session)
            for hook in session.hooks:
                hook.on_end("completed")

        actions = {"trainer": trainer, "bare": lambda: bare_loop(bare, steps)}
        samples = interleave(actions, repeats=repeats, warmup=2)
    tokens = steps * config.train.global_batch_size * config.train.seq_length
    close_groups()
    return SpineCost(
        hardware=ours.device.hardware,
        throughput_ratio=ratio(samples.clock, "bare", "trainer"),
        processor_ratio=ratio(samples.processor, "bare", "trainer"),
        trainer_tokens_per_second=Spread.of([tokens / s for s in samples.clock["trainer"]]),
        bare_tokens_per_second=Spread.of([tokens / s for s in samples.clock["bare"]]),
    )


def bare_loop(session: OpenExperiment, steps: int) -> None:
    """Trains with the least that does: schedule, optimizer, learning rate.

    Nothing is read, nothing logged.
    """
    train_config = session.config.train
    forward_backward = session.stepper().forward_backward
    chunks, device = session.state.chunks, session.device.torch_device
    for _ in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        session.state.optimizer.zero_grad()
        microbatches = [
            {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            for batch in session.next_step()
        ]
        forward_backward(
            forward_step_func=_forward_step,
            data_iterator=[iter(copy) for copy in itertools.tee(microbatches, len(chunks))]
            if len(chunks) > 1
            else iter(microbatches),
            model=chunks,
            num_microbatches=len(microbatches),
            seq_length=train_config.seq_length,
            micro_batch_size=train_config.micro_batch_size,
            forward_only=False,
        )
        session.state.optimizer.step()
        session.state.scheduler.step(1)
        # As the trainer does, to tell what a step took.
        session.device.synchronize()


def _forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, object]:
    batch = next(batches)
    losses = model(
        batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"]
    )

    def mean_loss(losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        return loss, loss.detach()

    return losses, mean_loss
