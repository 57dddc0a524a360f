"""Draws configurations that can be trained: values at random, then what refusals advise.

Which settings go together is written in the checks of the configuration and nowhere else. So a
drawing that is refused is mended as a user would: what a refusal advises is done, or what it names
is left out, until nothing is refused. It takes no torch and some milliseconds.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

from mone_megatron.config.convert import from_dict
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.config.without_effect import unread_keys
from mone_megatron.testing.fuzz.corpora import SHARES
from mone_megatron.testing.fuzz.fields import draw, keys, text

# What every run is: some layers, some steps, nothing shown. Shrinking leaves it.
BASE: Mapping[str, str] = {
    "device": "cpu",
    "device.threads": "1",
    "logging.wandb.mode": "disabled",
    "logging.report": "false",
    "logging.progress": "none",
    "logging.layer_interval": "1",
    "model.num_layers": "2",
    "train.steps": "4",
    "train.seq_length": "32",
    "train.global_batch_size": "4",
    "checkpoint.interval": "2",
    "checkpoint.keep_last": "2",
}
EXPERIMENTS = ("tiny_mone", "tiny_mone", "tiny_moe")
# Corpus -> the overrides that read it (:mod:`.corpora`).
Corpora = Mapping[str, Mapping[str, str]]
AXES = ("tensor", "pipeline", "context", "expert", "expert_tensor")
_ADVISED = re.compile(r"\b((?:[a-z_]+\.)+[a-z_]+)=(\[[^\]]*\]|[^\s,;\]]+)")
_USE = re.compile(r"; (?:use|set) (?:at least |at most )?(\[[^\]]*\]|[\w.+-]+)")
_NAMES = re.compile(r"\b(?:[a-z_]+\.)+[a-z_]+")
_MENDS = 40


@dataclass(frozen=True)
class Drawing:
    """Is one configuration, and a layout that it is trained in beside one rank.

    Attributes:
        experiment: what it begins with.
        overrides: key -> value as an override has it, beside :data:`BASE`.
        layout: the same of ``parallel``, on ``ranks`` ranks; empty for none.
        ranks: how many train it beside one.
        data: the corpus (:mod:`.corpora`).
    """

    experiment: str
    overrides: Mapping[str, str]
    layout: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 1
    data: str = "words"

    def settings(self, *more: Mapping[str, str]) -> list[str]:
        """Returns the overrides of a run, the later ones over the earlier."""
        all_of_them = dict(BASE) | dict(self.overrides)
        for given in more:
            all_of_them |= dict(given)
        return [
            f"experiment={self.experiment}",
            *(f"{key}={value}" for key, value in all_of_them.items()),
        ]

    @property
    def words(self) -> str:
        """Returns it as one text, which :func:`parse` reads."""
        parts = [f"experiment={self.experiment}"]
        parts += [] if self.data == "words" else [f"corpus={self.data}"]
        parts += [f"{key}={value}" for key, value in self.overrides.items()]
        if self.ranks > 1:
            parts += [f"ranks={self.ranks}", *(f"{k}={v}" for k, v in self.layout.items())]
        return " ".join(parts)


def parse(words: str) -> Drawing:
    """Returns the drawing that a text names (:attr:`Drawing.words`).

    Raises:
        ValueError: a part is no ``key=value``.
    """
    given: dict[str, str] = {}
    for part in words.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--case: {part!r} is no key=value; write such as mone.rule=mass")
        given[key] = value
    experiment, ranks = given.pop("experiment", "tiny_mone"), given.pop("ranks", "1")
    data = given.pop("corpus", "words")
    if not ranks.isdecimal():
        raise ValueError(f"--case: ranks={ranks} is no number of ranks; use ranks=2")
    drawn = _drawn_names()
    layout = {k: given.pop(k) for k in [*given] if k.startswith("parallel.") and k not in drawn}
    return Drawing(experiment, given, layout, int(ranks), data)


@functools.lru_cache(maxsize=16)
def _tree(experiment: str) -> dict[str, Any]:
    """Returns the configuration of an experiment with :data:`BASE`, as nested dictionaries."""
    return asdict(compose(Drawing(experiment, {}).settings()))


def config_of(drawing: Drawing, *more: Mapping[str, str]) -> Config:
    """Returns the configuration of a drawing, without Hydra, which takes a hundred times as long.

    Raises:
        ConfigError: a key is unknown, or a value of another type.
    """
    tree = copy.deepcopy(_tree(drawing.experiment))
    for given in (drawing.overrides, *more):
        for key, value in given.items():
            *path, last = key.split(".")
            place = tree
            for name in path:
                place = place[name]
            place[last] = _read(value)
    return from_dict(Config, tree)


def _read(value: str) -> Any:
    """Returns the value that an override's text stands for."""
    if value.startswith("["):
        return [_read(item) for item in value.strip("[]").split(",") if item]
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def refusals(drawing: Drawing, corpora: Corpora, *, ranks: int = 1) -> Sequence[str]:
    """Returns what the checks refuse of a drawing; nothing when it can be trained.

    Args:
        drawing: the configuration.
        corpora: the overrides of each corpus.
        ranks: 1 for one rank, or the drawing's own number for its layout.
    """
    layout = drawing.layout if ranks > 1 else {}
    try:
        validate(config_of(drawing, corpora[drawing.data], layout), world_size=ranks)
    except ConfigError as error:
        return error.problems
    return ()


def draw_wild(random: Random) -> Drawing:
    """Returns values drawn without a look at whether they go together."""
    known = list(keys())
    choices = [key for key in known if key.is_choice]
    # A method is one of many; most other choices are of two or three.
    weights = [5 if key.is_method else 2 if key.field.is_open else 1 for key in choices]
    drawn = random.choices(choices, weights, k=random.randint(1, 10))
    drawn += random.sample([key for key in known if not key.is_choice], random.randint(0, 9))
    # Options come after what they are options of.
    drawn.sort(key=lambda key: key.field.is_open)
    experiment = random.choice(EXPERIMENTS)
    overrides: dict[str, str] = {}
    for key in drawn:
        overrides |= draw(key, overrides, random)
    (data,) = random.choices([*SHARES], [*SHARES.values()])
    return Drawing(experiment, overrides, data=data)


def draw_valid(random: Random, corpora: Corpora) -> Drawing:
    """Returns a drawing that the checks of the configuration accept on one rank.

    Args:
        random: where chance comes from.
        corpora: the overrides of each corpus.
    """
    while True:
        drawing = mended(draw_wild(random), corpora, random)
        if drawing is not None:
            # What has no effect is no other configuration; some stays, to be no harm.
            return drawing if random.random() < 0.1 else _effective(drawing, corpora)


def _effective(drawing: Drawing, corpora: Corpora) -> Drawing:
    """Returns it without the settings that have no effect, or are as they would be without."""
    unread = unread_keys(config_of(drawing, corpora[drawing.data]))
    usual = _tree(drawing.experiment)
    kept = {}
    for key, value in drawing.overrides.items():
        place: Any = usual
        for name in key.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        same = tuple(place) if isinstance(place, list) else place
        read = _read(value)
        read = tuple(read) if isinstance(read, list) else read
        if key not in unread and (same is None or same != read):
            kept[key] = value
    fewer = replace(drawing, overrides=kept)
    return drawing if refusals(fewer, corpora) else fewer


def mended(drawing: Drawing, corpora: Corpora, random: Random) -> Drawing | None:
    """Returns it with what refusals advise; None when that leads nowhere."""
    for _ in range(_MENDS):
        problems = refusals(drawing, corpora)
        if not problems:
            return drawing
        drawing = _mend(drawing, random.choice(problems), random)
    return None


def _mend(drawing: Drawing, problem: str, random: Random) -> Drawing:
    """Does one of the things that a refusal advises, or leaves out one of those it names."""
    key = problem.partition(":")[0]
    advice = problem.rpartition(";")[2]
    overrides = dict(drawing.overrides)
    advised = [pair for pair in _ADVISED.findall(advice) if _may_set(pair[0])]
    if found := _USE.search(problem):
        advised.append((key, found[1].rstrip(".")))
    named = [name for name in _NAMES.findall(problem) if name in overrides]
    if advised and random.random() < 0.85:
        name, value = random.choice(advised)
        overrides[name] = value
    elif named:
        gone = random.choice(named)
        del overrides[gone]
        if gone in (owners := _options_by_owner()):
            overrides = {k: v for k, v in overrides.items() if not k.startswith(owners[gone])}
    elif overrides:
        del overrides[random.choice([*overrides])]
    return replace(drawing, overrides=overrides)


@functools.cache
def _drawn_names() -> frozenset[str]:
    return frozenset(key.name for key in keys())


def _may_set(name: str) -> bool:
    """Returns whether an advice is about a key that is drawn, or an option of a method."""
    return name in _drawn_names() or name.rpartition(".")[0] in _drawn_names()


@functools.cache
def _options_by_owner() -> Mapping[str, str]:
    """Returns what the keys of options begin with, by the key that chooses the method."""
    return {owner: f"{key.name}." for key in keys() if (owner := key.owner)}


def draw_layout(drawing: Drawing, random: Random, corpora: Corpora, *, most: int = 4) -> Drawing:
    """Returns the drawing with a layout that its model can be trained in, if one is soon found."""
    for _ in range(12):
        ranks = random.choice([count for count in (2, 2, 4) if count <= most])
        layout: dict[str, str] = {}
        for axis in random.sample(AXES, random.randint(0, 2)):
            layout[f"parallel.{axis}"] = text(random.choice((2, 2, ranks)))
        if layout.get("parallel.pipeline") and random.random() < 0.3:
            layout["parallel.virtual_pipeline"] = "2"
        if random.random() < 0.2:
            layout["parallel.dispatcher"] = "allgather"
        laid = replace(drawing, layout=layout, ranks=ranks)
        if not refusals(laid, corpora, ranks=ranks):
            return laid
    return drawing
