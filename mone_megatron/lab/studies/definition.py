"""Reads a study as data: what is trained, how often, and what is compared with what.

A file says, for example::

    question: Does MoNE match the MoE with half of its expert parameters activated?
    experiment: claims_mone
    reference: MoE
    variants:
      MoE: [mone.enabled=false]
      MoNE 1/4: []

Every variant is trained with the same seeds, which decide weights and order of data, so variants
are compared seed by seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.planning.budget import usage_is_fixed
from mone_megatron.planning.match import Count, value_of

CLAIMS_DIR = Path(__file__).parent / "claims"
METHODS_DIR = Path(__file__).parent / "methods"
# Two counts of parameters or operations are equal if they differ by no more.
EQUAL_WITHIN = 0.01
Equal = Literal["", "activated", "flops", "total"]


@dataclass(frozen=True)
class Study:
    """Holds what a study's file says.

    Attributes:
        name: of the file.
        question: the question that it is to answer, for people.
        experiment: the option of ``conf/experiment`` that variants start from.
        reference: the variant that others are compared with.
        variants: what each changes, as overrides; every variant once for each seed.
        overrides: Hydra overrides of all variants.
        equal: what all variants must have the same number of (within 1%), or "". Where a method
            does not fix it, the number that its runs had at their end counts.
    """

    name: str
    question: str
    experiment: str
    reference: str
    variants: Mapping[str, tuple[str, ...]]
    overrides: tuple[str, ...] = ()
    equal: Equal = ""

    def arguments(self, variant: str) -> list[str]:
        """Returns the Hydra overrides of a variant, without seed and folder."""
        return [f"experiment={self.experiment}", *self.overrides, *self.variants[variant]]

    @cached_property
    def configs(self) -> dict[str, Config]:
        """Returns each variant's configuration, checked for one process.

        Raises:
            ValueError: naming the study, the variant and the key.
        """
        configs = {}
        for variant in self.variants:
            try:
                config = compose([*self.arguments(variant), "device.kind=cpu"])
                validate(config, world_size=1, num_devices=0, local_world_size=1)
            except ConfigError as error:
                raise ValueError(f"{self.name}: {variant}: {error}") from error
            if not config.train.eval_interval:
                raise ValueError(
                    f"{self.name}: {variant}: train.eval_interval: 0 gives no validation loss to "
                    "compare; use a number of steps"
                )
            if not usage_is_fixed(config) and not config.logging.layer_interval:
                raise ValueError(
                    f"{self.name}: {variant}: logging.layer_interval: 0 does not record how many "
                    "neurons or experts its tokens use; use a number of steps"
                )
            configs[variant] = config
        self._check_equal(configs)
        return configs

    def _check_equal(self, configs: Mapping[str, Config]) -> None:
        if not self.equal:
            return
        count: Count = self.equal
        if not self._is_set(configs[self.reference]):
            return
        wanted = value_of(configs[self.reference], count)
        for variant, config in configs.items():
            value = value_of(config, count)
            if self._is_set(config) and abs(value - wanted) > EQUAL_WITHIN * wanted:
                raise ValueError(
                    f"{self.name}: {variant}: {value:,} is not the {wanted:,} ({count}) of "
                    f"{self.reference}; tools/plan.py --match finds what is"
                )

    def only(self, names: Sequence[str]) -> Study:
        """Returns the study of the reference and of these variants.

        Raises:
            ValueError: for a name that is no variant's, and for no other than the reference's.
        """
        for name in names:
            if name not in self.variants:
                # Names may have commas.
                known = "; ".join(self.variants)
                raise ValueError(f"--variants: {name!r} is none of {self.name}'s: {known}")
        chosen = {
            name: changes
            for name, changes in self.variants.items()
            if name in names or name == self.reference
        }
        if len(chosen) < 2:
            raise ValueError(
                f"--variants: {self.reference} is what {self.name} compares with; name another, too"
            )
        return replace(self, variants=chosen)

    def _is_set(self, config: Config) -> bool:
        """Returns whether the count is known before training; what else must be equal is judged by
        what was measured (:mod:`mone_megatron.lab.studies.outcome`).
        """
        return self.equal == "total" or usage_is_fixed(config)


def shipped_studies() -> list[Path]:
    """Returns the files of ours: those of the paper's claims, then those of other methods."""
    return sorted(CLAIMS_DIR.glob("*.yaml")) + sorted(METHODS_DIR.glob("*.yaml"))


def load_study(where: str | Path) -> Study:
    """Reads a study: a file, or the name of one of ours.

    Raises:
        ValueError: for what is not one, naming the file and the key.
    """
    path = Path(where)
    if not path.suffix:
        shipped = {file.stem: file for file in shipped_studies()}
        if str(where) not in shipped:
            known = ", ".join(shipped)
            raise ValueError(f"{where}: no study of that name; there are {known}, or give a file")
        path = shipped[str(where)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    return _study(path, content)


def _study(path: Path, content: Any) -> Study:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a mapping of keys")
    known = {"question", "experiment", "reference", "variants", "overrides", "equal"}
    if unknown := sorted(set(map(str, content)) - known):
        raise ValueError(f"{path}: {unknown[0]}: unknown; use {', '.join(sorted(known))}")
    for key in ("question", "experiment", "reference", "variants"):
        if not content.get(key):
            raise ValueError(f"{path}: {key}: is missing")
    variants = content["variants"]
    if not isinstance(variants, dict) or len(variants) < 2:
        raise ValueError(f"{path}: variants: a mapping of at least two is needed")
    reference = str(content["reference"])
    if reference not in map(str, variants):
        raise ValueError(f"{path}: reference: {reference!r} is not among the variants")
    equal: Equal = content.get("equal") or ""
    if equal not in get_args(Equal):
        raise ValueError(f"{path}: equal: {equal!r} is not one of activated, flops, total")
    study = Study(
        name=path.stem,
        question=str(content["question"]),
        experiment=str(content["experiment"]),
        reference=reference,
        variants={
            str(name): _overrides(path, f"variants.{name}", changes)
            for name, changes in variants.items()
        },
        overrides=_overrides(path, "overrides", content.get("overrides") or []),
        equal=equal,
    )
    folders = [folder_of(variant) for variant in study.variants]
    if len(set(folders)) < len(folders):
        raise ValueError(f"{path}: variants: two of them would share a folder; rename one")
    return study


def _overrides(path: Path, key: str, values: Any) -> tuple[str, ...]:
    listed: Sequence[Any] = values if isinstance(values, list) else [None]
    if not all(isinstance(value, str) and "=" in value for value in listed):
        raise ValueError(f"{path}: {key}: is not a list of key=value")
    fixed = ("train.seed=", "run.dir=", "experiment=")
    for value in listed:
        if value.startswith(fixed):
            raise ValueError(f"{path}: {key}: {value}: the study sets it itself")
    return tuple(listed)


def folder_of(variant: str) -> str:
    """Returns the name of the variant's folder."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", variant).strip("_")
