"""Turns overrides with several values (``key=a,b``) into the command lines of a sweep.

In Hydra's own grammar, so ``choice(...)``, ``range(...)`` and quoted commas mean what they mean
under ``--multirun``; the job launcher needs the command lines before anything runs.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import CONF_DIR, check_overrides

# What Hydra's own sweeper refuses, and what it looks up in folders.
_ENDLESS = ("interval(", "glob(")


@dataclass(frozen=True)
class Combination:
    """Describes one run of a sweep.

    Attributes:
        label: its swept keys and values, fit for a file name and for no other run of the sweep.
        overrides: its command line, with one value for each key.
    """

    label: str
    overrides: tuple[str, ...]


def expand(overrides: Sequence[str]) -> list[Combination]:
    """Returns every combination, the last swept key varying fastest; one where none is swept.

    Raises:
        ConfigError: for an override that Hydra cannot read, and for a sweep without a list of
            values (``interval``, ``glob``).
    """
    for text in overrides:
        key, _, value = text.partition("=")
        if value.startswith(_ENDLESS):
            raise ConfigError(f"{key}: {value} is not a list of values; write {key}=a,b,c")
    if problems := check_overrides(overrides, multirun=True):
        raise ConfigError(problems)
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    swept: list[str] = []
    for text in overrides:
        override = parser.parse_override(text)
        if not override.is_sweep_override():
            choices.append([text])
            continue
        key = override.get_key_element()
        choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        swept.append(key)
    combinations = [
        Combination(_label(chosen, swept), chosen) for chosen in itertools.product(*choices)
    ]
    return _distinct(combinations)


def folders_of_runs(
    combinations: Sequence[Combination], folders: Sequence[Path], *, given: bool, name: str
) -> tuple[Path, list[Path]]:
    """Returns a folder for a sweep and one in it for each of its runs.

    Args:
        combinations: the runs of the sweep.
        folders: what ``run.dir`` of each of them says.
        given: whether the command line says ``run.dir``; then it holds the runs, or is made of what
            is swept and stays as it is.
        name: of the sweep, for a folder of its own where none is given.
    """
    if given and len(set(folders)) == len(folders):
        return Path(os.path.commonpath(folders)), list(folders)
    folder = folders[0] if given else Path("runs", "sweeps", name)
    return folder, [folder / combination.label for combination in combinations]


def file_name(name: str) -> str:
    """Returns a name without what no file name should hold."""
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "run"


def spell_out_ablation(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with what an ablation sets and sweeps in place of ``ablation=NAME``.

    A file of that group is for ``--multirun``: Hydra names its runs while it sweeps. A run that is
    started by itself gets plain overrides instead, and where the file puts its runs:
    ``runs/ablations/EXPERIMENT/NAME``.

    Raises:
        ConfigError: for an ablation that is not there, or one without an experiment.
    """
    given = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    names = [text for text in overrides if text.startswith("ablation=")]
    if len(names) > 1 or (names and "," in names[0]):
        raise ConfigError(f"ablation: {' '.join(names)}: one at a time; submit a sweep for each")
    name = given.get("ablation")
    if name is None:
        return list(overrides)
    if problems := check_overrides([f"ablation={name}"], multirun=True):
        raise ConfigError(problems)
    if "experiment" not in given:
        raise ConfigError(f"ablation: {name} of which experiment? add experiment=NAME")
    experiment = given["experiment"]
    content = yaml.safe_load((CONF_DIR / "ablation" / f"{name}.yaml").read_text(encoding="utf-8"))
    named = {
        "run.dir": f"runs/ablations/{experiment}/{name}",
        "logging.wandb.group": f"{experiment}-{name}",
    }
    settings = {
        key: value
        for key, value in _flat(content)
        if key != "run.name" and key not in named and not key.startswith("hydra.")
    }
    spelt = settings | named | content["hydra"]["sweeper"]["params"]
    return [
        *(text for text in overrides if not text.startswith("ablation=")),
        *(f"{key}={value}" for key, value in spelt.items() if key not in given),
    ]


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _label(chosen: Sequence[str], swept: Sequence[str]) -> str:
    """Returns what is swept as a file name: ``keep_ratio_0.125-seed_1``."""
    parts = []
    for text in chosen:
        key, _, value = text.partition("=")
        if key in swept:
            parts.append(f"{key.rsplit('.', 1)[-1]}_{value}")
    return "-".join(re.sub(r"(?:[^\w.]|_)+", "_", part).strip("_") for part in parts)


def _distinct(combinations: Sequence[Combination]) -> list[Combination]:
    """Returns the runs, numbered where a file name cannot hold what they differ in."""
    labels = [combination.label for combination in combinations]
    if len(set(labels)) == len(labels):
        return list(combinations)
    return [
        Combination(f"{number}-{combination.label}", combination.overrides)
        for number, combination in enumerate(combinations)
    ]
