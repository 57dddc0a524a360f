"""Is the entry point: Hydra overrides -> checked, typed config -> ``train.run``; nothing else.

python -m mone_megatron.pretrain experiment=tiny_mone train.steps=5
torchrun --nproc-per-node 2 -m mone_megatron.pretrain experiment=quickstart_mone
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

_INTERRUPTIBLE = (
    __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _INTERRUPTIBLE:
    # Ctrl-C while the rest is imported ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mone_megatron.command_line import (
    INTERRUPTED_EXIT_CODE,
    USAGE_EXIT_CODE,
    interrupted,
    print_error,
    told,
)
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import (
    CONF_DIR,
    CONFIG_NAME,
    check_overrides,
    compose,
    from_dictconfig,
    hydra_override,
    typed_values,
)
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.config.without_effect import without_effect
from mone_megatron.data.prepare import check_cache, prepare_data
from mone_megatron.display import harmless_output
from mone_megatron.dry_run import dry_run
from mone_megatron.helpers import HelperError
from mone_megatron.large_imports import first_import_of
from mone_megatron.local_sweep import LocalSweep
from mone_megatron.megatron_release import check_megatron_release
from mone_megatron.ownership import await_owner, owned_folder
from mone_megatron.parallel.world import World
from mone_megatron.train.named_checkpoints import check_named_checkpoints
from mone_megatron.train.run_directory import check_run_directory

FAILED_EXIT_CODE = 1
# Longer than it takes to read a screenful; shorter than any limit after which a run counts as hung.
_READER_PATIENCE_SECONDS = 20.0
# Hydra's flags, but those that read files from elsewhere: what such a file says in Hydra's own
# sections is built and run. The first are followed by a value.
_FLAGS_WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-i", "--info")
_FLAGS = (*_FLAGS_WITH_VALUE, "-m", "--multirun", "--resolve", "-h", "--help", "--hydra-help")
# Ours: everything is checked and nothing trained, for as many processes as are named.
_DRY_RUN = "--dry-run"


def pretrain(config: Config, written: Mapping[str, str] | None = None) -> int:
    """Checks everything that can be checked without a device, then trains.

    Args:
        config: the configuration of the run.
        written: key -> the value as it stands on the command line, for what is wrong with it.

    Returns:
        The exit code of :func:`mone_megatron.train.run.run`, or 1 when a file of the run could not
        be written.

    Raises:
        ValueError: for a configuration, data or environment that cannot work, or a ``run.dir`` that
            another run owns, before any device or process group is touched.
    """
    with harmless_output(patience=_READER_PATIENCE_SECONDS):
        return _pretrain(config, written)


def _pretrain(config: Config, written: Mapping[str, str] | None) -> int:
    started = time.monotonic()
    world = World.from_environment()
    check = partial(
        validate,
        config,
        world_size=world.size,
        local_world_size=world.local_size,
        written=written,
    )
    # First without torch, whose import takes longer than all else before a refusal.
    check()
    if (untried := check_megatron_release()) and world.rank == 0:
        print(f"WARNING: {untried}", file=sys.stderr)
    if world.rank == 0:
        for line in without_effect(config, written or {}):
            print(line, file=sys.stderr)
        print(
            f"{config.run.name}: configuration checked; loading torch and megatron-core", flush=True
        )
    with _own_run_directory(config, world):
        with first_import_of("torch"):
            import torch

            from mone_megatron.parallel.device import open_device

        layout = check(num_devices=torch.cuda.device_count())
        if world.rank == 0:
            check_cache(config.data)
        data = prepare_data(config)
        with first_import_of("megatron.core"):
            device = open_device(config.device, world)
            # Only now: megatron-core binds names of torch.cuda at import.
            from mone_megatron.train.run import run

        try:
            return run(
                config, layout=layout, data=data, device=device, world=world, started=started
            )
        except HelperError as error:
            # Of this rank's alone, unlike the others.
            where = f"rank {world.rank}: " if world.size > 1 else ""
            print_error(f"{where}{error}")
            return FAILED_EXIT_CODE
        except OSError as error:
            # One that names no file is no refusal of the file system's.
            if error.filename is None:
                raise
            _tell(error, world)
            return FAILED_EXIT_CODE


@contextmanager
def _own_run_directory(config: Config, world: World) -> Iterator[None]:
    """Owns ``run.dir`` on rank 0; the others make sure that no run of another job does."""
    folder = Path(config.run.dir)
    if world.rank != 0:
        await_owner("run.dir", folder, job=world.job)
        yield
        return
    with owned_folder("run.dir", folder, job=world.job, allocation=world.allocation):
        check_run_directory(folder)
        check_named_checkpoints(config)
        yield


def _through_hydra(sweep: LocalSweep | None) -> None:
    """Runs through Hydra, for its own flags: ``--multirun``, ``--cfg job``, ``--help``.

    A run that does not end with 0 ends the sweep: Hydra knows exit codes only this way.
    """

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)
    def call(composed: DictConfig) -> None:
        try:
            given = HydraConfig.get().overrides.task
            written = typed_values(given)
            config = from_dictconfig(composed, written)
            code = pretrain(config if sweep is None else sweep.named(config, given), written)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise
            _tell(error, World.from_environment())
            code = USAGE_EXIT_CODE
        if code:
            raise SystemExit(code)

    call()


def _tell(error: ValueError | OSError, world: World) -> None:
    """Prints one line for each problem, once: on rank 0."""
    if world.rank == 0:
        print_error(told(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs from a command line; user errors are one line each, without a traceback.

    So is Ctrl-C while a run starts, which is imports first of all; in training it stops the run.
    """
    with harmless_output(patience=_READER_PATIENCE_SECONDS):
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        except KeyboardInterrupt:
            if World.from_environment().rank != 0:
                return INTERRUPTED_EXIT_CODE
            return interrupted("interrupted while nothing was being trained")


def _main(arguments: list[str]) -> int:
    flags = [argument for argument in arguments if argument.startswith("-")]
    world = World()
    try:
        world = World.from_environment()
        dry = [flag for flag in flags if flag.partition("=")[0] == _DRY_RUN]
        if dry:
            return _dry_run([given for given in arguments if given not in dry], dry[-1], world)
        if unknown := [flag for flag in flags if flag.split("=")[0] not in _FLAGS]:
            taken = ", ".join((*_FLAGS, _DRY_RUN))
            raise ConfigError([f"{flag}: not taken; use {taken}" for flag in unknown])
        if flags:
            overrides: list[str] = []
            for_hydra: list[str] = []
            for before, argument in zip(["", *arguments], arguments, strict=False):
                is_override = not argument.startswith("-") and before not in _FLAGS_WITH_VALUE
                (overrides if is_override else for_hydra).append(argument)
            multirun = "-m" in flags or "--multirun" in flags
            if problems := check_overrides(overrides, multirun=multirun):
                raise ConfigError(problems)
            sweep = LocalSweep(overrides, world) if multirun else None
            # What it reads; overrides on both sides of a flag it would refuse.
            sys.argv[1:] = [*for_hydra, *map(hydra_override, overrides)]
            _through_hydra(sweep)
            if sweep is not None and world.rank == 0:
                sweep.compare()
            return 0
        return pretrain(compose(arguments), typed_values(arguments))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        _tell(error, world)
        return USAGE_EXIT_CODE


def _dry_run(overrides: list[str], flag: str, world: World) -> int:
    """Checks a run of the overrides, prints what it would be, and returns the exit status."""
    if flags := [argument for argument in overrides if argument.startswith("-")]:
        raise ConfigError(f"{flags[0]}: not with {_DRY_RUN}; check one run, without it")
    _, given, number = flag.partition("=")
    if given and not (number.isdecimal() and int(number) > 0):
        raise ConfigError(f"{flag}: names no number of processes; write {_DRY_RUN}=8")
    processes = int(number) if given else None
    lines = dry_run(compose(overrides), world, processes, typed_values(overrides))
    if world.rank == 0:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    if _INTERRUPTIBLE:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
