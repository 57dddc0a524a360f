"""The build spine: from a checked configuration to a finished run. Read this first."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mone_megatron import __version__
from mone_megatron.checkpoint.names import checkpoint_name
from mone_megatron.config.layout import Layout
from mone_megatron.config.load import to_yaml
from mone_megatron.config.megatron import graphs_attention
from mone_megatron.config.schema import Config
from mone_megatron.data.datasets import build_datasets
from mone_megatron.data.loader import MicrobatchSampler, SampleDataset, build_loader
from mone_megatron.data.prepare import PreparedData
from mone_megatron.kernels import ops
from mone_megatron.methods.hook import Hook
from mone_megatron.os_errors import naming
from mone_megatron.parallel.device import Device, open_process_group
from mone_megatron.parallel.groups import close_groups, open_groups
from mone_megatron.parallel.world import World
from mone_megatron.planning.flops import flops_per_step
from mone_megatron.planning.parameters import ParameterCount, count_parameters
from mone_megatron.train.compile_kernels import compile_kernels
from mone_megatron.train.evaluate.scoring import Scorer
from mone_megatron.train.evaluate.tasks import TaskEvaluation
from mone_megatron.train.health.signals import StopRequest
from mone_megatron.train.health.watchdog import BACKSTOP_SECONDS, Watchdog, WatchdogHook
from mone_megatron.train.hooks.added import added_hooks
from mone_megatron.train.hooks.on_every_rank import hooks_on_every_rank
from mone_megatron.train.hooks.on_rank_0 import Shown, hooks_on_rank_0
from mone_megatron.train.introduction import introduce, say
from mone_megatron.train.loop import train
from mone_megatron.train.resume.checkpointer import Checkpointer
from mone_megatron.train.resume.identity import run_identity
from mone_megatron.train.run_directory import keep_metrics_up_to, now, open_run_directory, run_id
from mone_megatron.train.session import Session
from mone_megatron.train.state import build_state
from mone_megatron.train.step import Batch, Stepper, usual_rows


def _loader(
    config: Config,
    layout: Layout,
    device: Device,
    dataset: SampleDataset,
    *,
    first: int,
    last: int,
) -> Iterator[Batch]:
    """Returns this rank's microbatches of the steps after ``first`` up to ``last``."""
    sampler = MicrobatchSampler(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=layout.data,
        start_step=first,
        end_step=last,
    )
    return build_loader(
        dataset, sampler, num_workers=config.data.num_workers, pin=device.kind == "cuda"
    )


def _facts(session: Session, data: PreparedData, parameters: ParameterCount) -> dict[str, Any]:
    """Returns what run.json holds before the first step (docs/metrics.md)."""
    config, layout, device = session.config, session.layout, session.device
    flops = flops_per_step(config, data.vocab_size)
    return {
        "id": run_id(Path(config.run.dir)),
        "name": config.run.name,
        "world_size": layout.world_size,
        "device": device.kind,
        "dtype": str(device.dtype).removeprefix("torch."),
        "hardware": device.hardware,
        "versions": {
            "mone_megatron": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "data_fingerprint": data.fingerprint,
        "vocab_size": data.vocab_size,
        "parameters": parameters.recorded,
        "flops_per_step": {"ideal": flops.ideal, "realised": flops.realised},
        "seed": config.train.seed,
        "started": now(),
    }


def run(
    config: Config,
    *,
    layout: Layout,
    data: PreparedData,
    device: Device,
    world: World,
    started: float | None = None,
) -> int:
    """Trains.

    Args:
        config: validated.
        layout: what validation derived.
        data: prepared and checked.
        device: opened, so that megatron-core is imported for it.
        world: this process's place.
        started: when the run began, of ``time.monotonic()``; None for now.

    Returns:
        The exit code: 0, 1 when training failed, ``INTERRUPTED_EXIT_CODE`` or
        ``RESUME_EXIT_CODE``.
    """
    stop = StopRequest(
        exit_after_minutes=config.train.exit_after_minutes,
        started=started,
        launched=world.job != "",
    )
    try:
        with stop:
            patience = config.device.timeout_seconds
            backstop = patience + BACKSTOP_SECONDS
            open_process_group(device, world, backstop)
            with Watchdog(
                Path(config.run.dir),
                patience,
                computes_on_cpu=device.kind == "cpu",
                on_failure=stop.helper_failed,
            ) as watchdog:
                open_groups(
                    config.parallel,
                    config.train,
                    timeout_seconds=backstop,
                    in_graphs=graphs_attention(config.megatron),
                )
                return _run(config, layout, data, device, stop, watchdog)
    finally:
        close_groups()


def _run(
    config: Config,
    layout: Layout,
    data: PreparedData,
    device: Device,
    stop: StopRequest,
    watchdog: Watchdog,
) -> int:
    ops.use_kernels(config.device.kernels, config.device.grouped_gemm)
    ops.expect_rows(usual_rows(config), device.torch_device)
    session = _open_session(config, layout, data, device, stop)
    folder = Path(config.run.dir)
    parameters = count_parameters(config.model, config.mone, data.vocab_size)
    shown = _open_files(session, data, parameters) if dist.get_rank() == 0 else None
    introduce(session, data, parameters)
    start, checkpointer = session.start, session.checkpointer
    assert checkpointer is not None
    if start.step >= config.train.steps:
        say(f"nothing to train: the checkpoint is at train.steps={config.train.steps}")
    tasks = None
    if config.train.eval_tasks:
        scorer = Scorer(config, layout, device, session.state, data.vocab_size, watchdog.beat)
        tasks = TaskEvaluation(config.train, Path(data.tokenizer_dir), scorer, data.framing)
    session.hooks.extend(
        hooks_on_every_rank(session, tasks=tasks, show_panel=shown.panel if shown else None)
    )
    session.hooks.extend(added_hooks(session))
    session.hooks.extend(shown.hooks if shown else [])
    session.hooks.append(WatchdogHook(watchdog))
    if start.step < config.train.steps:
        compile_kernels(session)
    # So that there is always a state to roll back to.
    fresh = start.step == 0 or config.checkpoint.resume != "auto"
    if config.train.on_bad_loss == "rollback" and fresh and start.step < config.train.steps:
        checkpointer.save(start)

    with ExitStack() as endings:
        ending = _Ending()
        for hook in session.hooks:
            hook.on_start()
            # Every hook that started ends, also when another one fails.
            endings.callback(_end, hook, ending)
        endings.callback(checkpointer.abandon)
        try:
            outcome = train(session)
        except FloatingPointError as error:
            # What was saved before the fault is worth keeping; every rank comes here.
            checkpointer.finish()
            session.stepper.drop_graphs()
            say(f"training failed: {error}; metrics up to the step before are in {folder}")
            return 1
        session.stepper.drop_graphs()
        checkpointer.finish()
        ending.status = "completed" if outcome.exit_code is None else "interrupted"
    # A launcher ends the other processes when one has ended: not before rank 0's files are whole.
    dist.barrier()
    if outcome.exit_code is None:
        return 0
    say(
        f"stopped by {outcome.stopped_by} after step {outcome.position.step} of "
        f"{config.train.steps}; metrics are complete in {folder / 'metrics.jsonl'}"
    )
    say(_how_to_go_on(config, outcome.position.step))
    return outcome.exit_code


def _how_to_go_on(config: Config, step: int) -> str:
    """Returns what was saved of a run that was stopped after a step, and what takes it up again."""
    if config.checkpoint.interval == 0:
        return "nothing was saved (checkpoint.interval=0); a run with checkpoint=auto can go on"
    folder = Path(config.run.dir) / "checkpoints" / checkpoint_name(step)
    if config.checkpoint.resume == "auto":
        return f"saved to {folder}; the same command goes on from there"
    return f"saved to {folder}; the same command with checkpoint.resume=auto goes on from there"


def _open_session(
    config: Config, layout: Layout, data: PreparedData, device: Device, stop: StopRequest
) -> Session:
    """Builds what trains, and takes up the checkpoint that the run goes on from. Collective."""
    train_data, valid_data = build_datasets(
        config,
        data,
        num_train_samples=config.train.steps * config.train.global_batch_size,
        num_valid_samples=(
            config.train.eval_steps * config.train.global_batch_size
            if config.train.eval_interval > 0
            else 0
        ),
        build_here=True,
    )
    assert train_data is not None
    state = build_state(config, layout, device, data.vocab_size)
    checkpointer = Checkpointer(
        config,
        identity=run_identity(
            config,
            data_fingerprint=data.fingerprint,
            vocab_size=data.vocab_size,
            dtype=device.dtype,
        ),
        state=state,
        tokenizer_dir=Path(data.tokenizer_dir),
        framing=data.framing,
        say=say,
    )
    start = checkpointer.resume()

    def batches_from(step: int) -> Iterator[Batch]:
        return _loader(config, layout, device, train_data, first=step, last=config.train.steps)

    def validation() -> Iterator[Batch]:
        assert valid_data is not None
        steps = config.train.eval_steps
        return _loader(config, layout, device, valid_data, first=0, last=steps)

    return Session(
        config=config,
        layout=layout,
        device=device,
        vocab_size=data.vocab_size,
        state=state,
        stepper=Stepper(config, layout, device, state),
        batches_from=batches_from,
        validation=validation if valid_data is not None else None,
        start=start,
        stop=stop,
        checkpointer=checkpointer,
    )


def _open_files(session: Session, data: PreparedData, parameters: ParameterCount) -> Shown:
    """Opens the run's folder on rank 0, and returns the hooks that write into it."""
    config, start = session.config, session.start
    folder = Path(config.run.dir)
    if start.step == 0 or config.checkpoint.resume != "auto":
        moved = open_run_directory(folder)
        if moved:
            say(moved)
    seconds = keep_metrics_up_to(folder / "metrics.jsonl", start.step)
    with naming(folder / "config.yaml"):
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts = _facts(session, data, parameters)
    facts |= {"steps": start.step, "tokens": start.tokens, "seconds": seconds}
    return hooks_on_rank_0(config, folder, facts, session.device.torch_device)


@dataclass
class _Ending:
    """Holds how the run ended, for the hooks."""

    status: str = "failed"


def _end(hook: Hook, ending: _Ending) -> None:
    hook.on_end(ending.status)
