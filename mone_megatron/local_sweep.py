"""Runs sweeps on this machine (``-m``): one run after the other, compared at the end.

Hydra's sweeper makes the runs; what they are called and whether all of them can be run is settled
before the first one starts. On SLURM ``launch/jobs.py`` does the same for arrays of jobs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mone_megatron.command_line import told
from mone_megatron.config.load import compose, typed_values
from mone_megatron.config.schema import Config
from mone_megatron.config.sweep import expand, file_name, folders_of_runs
from mone_megatron.config.validate import validate
from mone_megatron.parallel.world import World


class LocalSweep:
    """Holds the runs of one command line with ``-m``."""

    def __init__(self, overrides: Sequence[str], world: World) -> None:
        """Checks every run of the sweep.

        Args:
            overrides: the command line without its flags. The runs of an ``ablation=`` are named by
                its file, and are known only when Hydra reads it.
            world: this process among those that each run has.

        Raises:
            ConfigError: what any of the runs would be refused for.
        """
        self._folders: list[Path] = []
        self._seeds = False
        # Keys with several values; the values of a run -> its folder and name.
        self._swept: tuple[str, ...] = ()
        self._names: dict[tuple[str | None, ...], tuple[Path, str]] = {}
        self._group = ""
        given = typed_values(overrides)
        if "ablation" in given:
            return
        combinations = expand(overrides)
        if len(combinations) < 2:
            return
        each = [typed_values(combination.overrides) for combination in combinations]
        self._swept = tuple(key for key in each[0] if len({one[key] for one in each}) > 1)
        configs = [compose(combination.overrides) for combination in combinations]
        for config in configs:
            validate(config, world_size=world.size, local_world_size=world.local_size)
        self._group = file_name(configs[0].run.name)
        _, folders = folders_of_runs(
            combinations,
            [Path(config.run.dir) for config in configs],
            given="run.dir" in given,
            name=self._group,
        )
        for combination, config, folder in zip(combinations, configs, folders, strict=True):
            name = config.run.name
            if "run.name" not in given:
                name = f"{name}-{combination.label}"
            self._names[self._swept_of(combination.overrides)] = (folder, name)
        self._seeds = len({config.train.seed for config in configs}) > 1

    def named(self, config: Config, overrides: Sequence[str]) -> Config:
        """Returns the configuration of a run under its own name and in its own folder.

        Args:
            config: the configuration of the run.
            overrides: the run's overrides, as Hydra made them.
        """
        known = self._names.get(self._swept_of(overrides))
        if known is not None:
            folder, name = known
            config = replace(config, run=replace(config.run, dir=str(folder), name=name))
            if not config.logging.wandb.group:
                wandb = replace(config.logging.wandb, group=self._group)
                config = replace(config, logging=replace(config.logging, wandb=wandb))
        self._folders.append(Path(config.run.dir))
        return config

    def _swept_of(self, overrides: Sequence[str]) -> tuple[str | None, ...]:
        """Returns the values of the swept keys; the others Hydra may write in its own way."""
        given = typed_values(overrides)
        return tuple(given.get(key) for key in self._swept)

    def compare(self) -> None:
        """Writes the comparison of the runs beside them and prints it; says so where it cannot."""
        folders = list(dict.fromkeys(self._folders))
        if len(folders) < 2 or len({folder.parent for folder in folders}) > 1:
            return
        from mone_megatron.ownership import owned_folder
        from mone_megatron.report.compare import compare
        from mone_megatron.report.comparison_files import text_report, write_comparison
        from mone_megatron.report.runs import load_run

        output = folders[0].parent
        try:
            with owned_folder("run.dir", output):
                runs = [load_run(folder) for folder in folders]
                comparison = compare(runs, None, group_seeds=self._seeds)
                paths = write_comparison(comparison, output)
        except (ValueError, OSError) as error:
            print(f"the runs are not compared: {told(error)}", file=sys.stderr)
            return
        print(text_report(comparison))
        print("".join(f"\nwrote {path}" for path in paths), flush=True)
