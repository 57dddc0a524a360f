"""Runs two versions one after the other and compares what they computed; keeps what BASE computed.

What BASE computed is kept in a cache folder by commit, machine and the way it was measured. HEAD is
always computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mone_megatron.ownership import locked
from mone_megatron.testing import words
from mone_megatron.testing.commit_comparison import measurements, values
from mone_megatron.testing.commit_comparison.differences import Measured, Outcome, compare
from mone_megatron.testing.commit_comparison.measurements import (
    GIVEN,
    GIVEN_BY,
    Measurement,
    Rows,
)
from mone_megatron.testing.commit_comparison.version import (
    Revision,
    Version,
    find_revision,
    sources,
)
from mone_megatron.whole_files import write_json, write_whole

Say = Callable[[str], None]

_PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "safetensors", "tokenizers")
# Sources that decide what is measured and how it is read: what is kept of BASE is of no use when
# one of them changes.
_MEASURING = (
    *(module.__file__ for module in (measurements, values, words)),
    measurements.RUNS_IN_TURN,
    measurements.EXPORT_LOGITS,
)


@dataclass(frozen=True)
class Comparison:
    """Holds what the comparison of two versions found.

    Attributes:
        base: the version that is right by definition.
        head: the version that must compute the same.
        machine: what decides how numbers are rounded.
        outcomes: one for each thing that was compared.
        seconds: how long it took.
    """

    base: Revision
    head: Revision
    machine: dict[str, str]
    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        """Returns whether everything was compared and is the same."""
        return all(outcome.status == "equal" for outcome in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "format": 1,
            "equal": self.equal,
            "base": asdict(self.base),
            "head": asdict(self.head),
            "machine": self.machine,
            "seconds": self.seconds,
            "outcomes": [outcome.as_json() for outcome in self.outcomes],
        }


def choose(*, quick: bool, only: Sequence[str] = ()) -> list[Measurement]:
    """Returns what is to be measured, in order, with what it needs.

    Args:
        quick: the few of ``--quick`` instead of all.
        only: names of measurements; empty for no such choice.

    Raises:
        ValueError: for an unknown name.
    """
    listed = measurements.measurements()
    if unknown := [name for name in only if name not in listed]:
        raise ValueError(f"--only: {', '.join(unknown)} unknown; there are {', '.join(listed)}")
    chosen = set(only) or {name for name, one in listed.items() if one.quick or not quick}
    for name, one in reversed(listed.items()):
        if name in chosen:
            chosen |= {*one.needs, *((GIVEN_BY,) if one.reads_base else ())}
    return [one for name, one in listed.items() if name in chosen]


def compare_commits(
    base: str,
    head: str | None,
    *,
    repository: Path,
    chosen: Sequence[Measurement],
    cache: Path,
    say: Say,
) -> Comparison:
    """Runs what was chosen with both versions, BASE first, and compares.

    Args:
        base: a git revision.
        head: a git revision; None for the working tree as it is.
        repository: whose revisions they are.
        chosen: from :func:`choose`.
        cache: where what BASE computed is kept.
        say: tells how far it is.

    Raises:
        ValueError: there is no such revision, or the cache cannot be written.
    """
    started = time.monotonic()
    of_base, of_head = find_revision(repository, base), find_revision(repository, head)
    machine = this_machine()
    place = cache.resolve() / f"{of_base.commit[:12]}-{_short_digest(machine)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "machine.json", machine, indent=1)
    except OSError as error:
        raise ValueError(
            f"--cache: {cache} cannot be used ({error.strerror}); give a folder that can be written"
        ) from None
    with ExitStack() as stack:
        stack.enter_context(_ended_like_ctrl_c())
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-")))
        # First, so that the working tree is compared as it is now.
        tree = stack.enter_context(sources(repository, of_head, temporary / "head"))
        head_version = Version(tree, temporary / "head_work")
        head_version.work.mkdir()
        head_version.check()
        say(f"BASE {of_base.describe()}")
        with locked(place / "lock"):
            measured_base = _measure_base(repository, of_base, place, temporary, chosen, say)
            if any(one.reads_base for one in chosen):
                shutil.copytree(place / "work" / GIVEN_BY, head_version.work / GIVEN)
        say(f"HEAD {of_head.describe()}")
        measured_head: Rows = {}
        for number, one in enumerate(chosen, start=1):
            measured_head |= _measure(head_version, one, f"HEAD {number}/{len(chosen)}", say)
    outcomes = tuple(compare(measured_base, measured_head))
    return Comparison(of_base, of_head, machine, outcomes, time.monotonic() - started)


def this_machine() -> dict[str, str]:
    """Returns what decides how numbers are rounded here: the processor and the libraries."""
    facts = {
        "processor": platform.processor() or platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags"):
                facts[name.strip()] = value.strip()
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _measure_base(
    repository: Path,
    revision: Revision,
    place: Path,
    temporary: Path,
    chosen: Sequence[Measurement],
    say: Say,
) -> Rows:
    """Returns what BASE computed, from the cache where it is there."""
    results = place / "results"
    results.mkdir(exist_ok=True)
    sources_digest = _sources_digest()
    recipes = {one.name: f"{sources_digest} {one.settings}" for one in chosen}
    known = {one.name: _kept(place, one, recipes[one.name]) for one in chosen}
    lacking = [name for name, rows in known.items() if rows is None]
    if lacking:
        with sources(repository, revision, temporary / "base") as tree:
            base = Version(tree, place / "work")
            base.work.mkdir(exist_ok=True)
            base.check()
            for number, one in enumerate(chosen, start=1):
                if known[one.name] is not None:
                    continue
                if one.reads_base:
                    shutil.rmtree(base.work / GIVEN, ignore_errors=True)
                    shutil.copytree(base.work / GIVEN_BY, base.work / GIVEN)
                rows = _measure(base, one, f"BASE {number}/{len(chosen)}", say)
                known[one.name] = rows
                # What failed may have been for want of disk or memory, and is tried again.
                if not any(row.error for row in rows.values()):
                    content = {
                        "recipe": recipes[one.name],
                        "rows": {what: row.values for what, row in rows.items()},
                    }
                    text = json.dumps(content)
                    write_whole(results / f"{one.name}.json", text)
    say(f"BASE: {len(chosen) - len(lacking)} of {len(chosen)} measurements were in {place}")
    measured: Rows = {}
    for found in known.values():
        assert found is not None
        measured |= found
    return measured


def _kept(place: Path, one: Measurement, recipe: str) -> Rows | None:
    """Returns a measurement from the cache; None when it is not there or was made another way."""
    path = place / "results" / f"{one.name}.json"
    # Others read the files that it wrote.
    if not path.exists() or not (place / "work" / one.name).is_dir():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["recipe"] != recipe:
        return None
    return {what: Measured(kept) for what, kept in content["rows"].items()}


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for source in _MEASURING:
        assert source is not None
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _measure(version: Version, one: Measurement, place: str, say: Say) -> Rows:
    began = time.monotonic()
    folder = version.work / one.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = one.measure(version, one.name)
    assert rows.keys() == set(one.rows), f"{one.name}: {rows.keys() ^ set(one.rows)}"
    failed = sum(bool(row.error) for row in rows.values())
    trouble = f", {failed} of {len(rows)} FAILED" if failed else ""
    say(f"{place} {one.name}: {time.monotonic() - began:.0f} s{trouble}")
    return {what: rows[what] for what in one.rows}


def _short_digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does: processes end, worktrees are removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
