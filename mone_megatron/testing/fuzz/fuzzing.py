"""Holds one drawing after another against what must be so of each, until its time is over."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from mone_megatron.testing.commit_comparison.values import flatten
from mone_megatron.testing.fuzz.agreement import disagreement, read_records
from mone_megatron.testing.fuzz.drawing import (
    AXES,
    Corpora,
    Drawing,
    draw_layout,
    draw_valid,
    draw_wild,
    refusals,
)
from mone_megatron.testing.fuzz.faults import Fault
from mone_megatron.testing.fuzz.server import Server
from mone_megatron.testing.fuzz.shrink import shrunk
from mone_megatron.testing.ports import free_ports

_TRIAL = "mone_megatron.testing.fuzz.trial"
_LAYOUT = "mone_megatron.testing.many_runs"
# Check -> the share of drawings that it is made of: those that take long are made of fewer.
SHARES: Mapping[str, float] = {
    "resume": 0.7,
    "counts": 1.0,
    "tools": 0.35,
    "studies": 0.12,
    "arguments": 0.25,
    "export": 0.6,
    "layout": 0.6,
    "releases": 0.5,
}
CHECKS = tuple(SHARES)
# How many drawings are asked for their refusals alone, for each that is trained.
_WILD = 10
_KEYED = re.compile(r"[a-z_]+(\.\w+)+: ")
_IN_TRIAL = ("resume", "counts", "tools", "studies", "arguments", "export")
# What a run does not do again in another layout, by what documents it.
_NO_LAYOUT = {
    "model.attention_dropout": "each rank draws for its own part",
    "model.hidden_dropout": "the same",
    "device.dtype": "bf16 rounds by more than the tolerance (docs/parallelism.md)",
    "logging.layer_interval": "flips are seen in what is counted every step",
}


@dataclass
class Fuzzer:
    """Makes the checks of drawings, and keeps count.

    Attributes:
        server: starts processes.
        corpora: overrides of each corpus.
        folder: for runs; what is of a drawing goes when it is done.
        checks: which are made, of :data:`CHECKS`.
        later: the same as ``server`` with another megatron-core; None for none.
        made: how often each check was made.
        trials: how many drawings were tried, tries of shrinking among them.
    """

    server: Server
    corpora: Corpora
    folder: Path
    checks: Sequence[str] = CHECKS
    later: Server | None = None
    made: Counter[str] = field(default_factory=Counter)
    trials: int = 0

    def faults(self, drawing: Drawing, checks: Sequence[str] | None = None) -> list[Fault]:
        """Returns what does not hold of a drawing."""
        checks = self.checks if checks is None else checks
        self.trials += 1
        folder = self.folder / f"{self.trials:05d}"
        try:
            return self._faults(drawing, checks, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _faults(self, drawing: Drawing, checks: Sequence[str], folder: Path) -> list[Fault]:
        overrides = drawing.settings(self.corpora[drawing.data])
        here = [name for name in checks if name in _IN_TRIAL]
        found, trained = self._trial(self.server, overrides, here, folder)
        if trained and "layout" in checks and drawing.ranks > 1:
            found += self._in_layout(drawing, folder)
        if trained and "releases" in checks and self.later is not None:
            self.made["releases"] += 1
            later, trained = self._trial(self.later, overrides, [], folder / "later")
            found += [Fault("releases", f"with the later one: {one.what}") for one in later]
            if trained and (where := _other_release(folder / "one", folder / "later" / "one")):
                found.append(Fault("releases", f"the later one trains otherwise: {where}"))
        return found

    def _trial(
        self, server: Server, overrides: Sequence[str], checks: Sequence[str], folder: Path
    ) -> tuple[list[Fault], bool]:
        result = folder / "result.json"
        job = {
            "overrides": list(overrides),
            "folder": str(folder),
            "checks": list(checks),
            "result": str(result),
        }
        codes = server.run(_TRIAL, job, folder)
        if not result.exists():
            said = (folder / "1-0.log").read_text(encoding="utf-8", errors="replace")
            last = " | ".join(said.strip().splitlines()[-2:])
            return [Fault("trial", f"the process ended with {codes[0]}: {last}")], False
        told = json.loads(result.read_text(encoding="utf-8"))
        self.made.update(told["made"])
        return [Fault(**one) for one in told["found"]], (folder / "one" / "run.json").exists()

    def _in_layout(self, drawing: Drawing, folder: Path) -> list[Fault]:
        self.made[f"layout on {drawing.ranks}"] += 1
        run = folder / "layout"
        overrides = drawing.settings(self.corpora[drawing.data], drawing.layout)
        job = [{"overrides": [*overrides, f"run.dir={run}"], "port": free_ports(1)[0]}]
        codes = self.server.run(_LAYOUT, job, folder / "ranks", ranks=drawing.ranks)
        if any(codes):
            return [Fault("layout", f"ended with {codes}: {_last_words(folder / 'ranks')}")]
        what = disagreement(read_records(folder / "one"), read_records(run))
        return [Fault("layout", f"not as on one rank: {what}")] if what else []


def _last_words(folder: Path) -> str:
    """Returns what the ranks said last of what is wrong."""
    said = []
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said += [line for line in lines if line.startswith("error:") or "Error" in line][-1:]
    return " | ".join(dict.fromkeys(said))[:400]


def _other_release(one: Path, other: Path) -> str:
    """Returns where the later release computes other bits; it may record fewer names."""
    for expected, actual in zip(read_records(one), read_records(other), strict=True):
        there, here = (flatten("", record) for record in (expected, actual))
        # What is recorded before the first step has neither.
        trained = [key for key in ("loss", "grad_norm") if key in there]
        for key in (*trained, *sorted(there.keys() & here.keys())):
            if there[key] != here.get(key):
                return f"step {expected['step']}: {key} is {here.get(key)}, not {there[key]}"
    return ""


def refusal_faults(random: Random, corpora: Corpora) -> list[tuple[Drawing, Fault]]:
    """Returns what is wrong with the refusals of a drawing that nobody has mended.

    It takes milliseconds, so it is asked of many more drawings than are trained.
    """
    drawing = draw_wild(random)
    ranks = random.choice((1, 2, 3, 4, 8, 64))
    layout = {f"parallel.{axis}": str(random.choice((1, 2, 3, 4))) for axis in AXES}
    drawing = replace(drawing, layout=layout, ranks=ranks)
    try:
        lines = refusals(drawing, corpora, ranks=ranks)
    except Exception as error:
        return [(drawing, Fault("refusals", f"a traceback: {type(error).__name__}: {error}"))]
    nameless = [line for line in lines if not _KEYED.match(line)]
    return [(drawing, Fault("refusals", f"no key is named: {line}")) for line in nameless]


@dataclass
class Report:
    """Says what was tried and found.

    Attributes:
        drawings: how many configurations were drawn and tried.
        found: the smallest drawing of each kind of fault, and what does not hold of it.
        again: how many more drawings had a fault of each kind.
    """

    drawings: int = 0
    found: dict[str, tuple[Drawing, Fault]] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)


def may_have_layout(drawing: Drawing) -> bool:
    """Returns whether layouts are said to agree on a drawing."""
    router = drawing.overrides.get("model.router.balance", "")
    return not _NO_LAYOUT.keys() & drawing.overrides.keys() and "global_aux_loss" not in router


def fuzz(
    fuzzer: Fuzzer,
    random: Random,
    *,
    seconds: float,
    drawings: int | None,
    show: Callable[[str], None],
    progress: Callable[[Report], None],
) -> Report:
    """Draws and tries until the time is over, or so many drawings are tried.

    Args:
        fuzzer: makes the checks.
        random: where drawings come from.
        seconds: after which no drawing is begun.
        drawings: after which no other is begun; None for any number.
        show: takes the words for a fault when it is found, and when it is shrunk.
        progress: is called after each drawing.
    """
    report = Report()
    end = time.monotonic() + seconds
    while time.monotonic() < end and report.drawings != drawings:
        for _ in range(_WILD):
            fuzzer.made["refusals"] += 1
            for drawn, fault in refusal_faults(random, fuzzer.corpora):
                if fault.kind not in report.found:
                    show(f"{fault.check}: {fault.what}\n  drawn: {drawn.words}")
                report.found.setdefault(fault.kind, (drawn, fault))
        drawing = draw_valid(random, fuzzer.corpora)
        checks = [name for name in fuzzer.checks if random.random() < SHARES[name]]
        if "layout" in checks and may_have_layout(drawing):
            drawing = draw_layout(drawing, random, fuzzer.corpora)
        report.drawings += 1
        for fault in fuzzer.faults(drawing, checks):
            if fault.kind in report.found:
                report.again[fault.kind] += 1
                continue
            show(f"{fault.check}: {fault.what}\n  drawn: {drawing.words}")
            report.found[fault.kind] = drawing, fault
            small = shrunk(drawing, _fails_like(fuzzer, fault, end + seconds / 2))
            report.found[fault.kind] = small, fault
            show(f"  smallest: {small.words}")
        progress(report)
    return report


def _fails_like(fuzzer: Fuzzer, fault: Fault, end: float) -> Callable[[Drawing], bool]:
    """Returns whether a drawing has the same kind of fault; after ``end`` none has."""
    checks = {"train": [], "trial": list(fuzzer.checks)}.get(fault.check)
    if checks is None:
        # Faults of tools are told by the tool.
        checks = [fault.check] if fault.check in CHECKS else ["tools", "studies", "export"]
    known: dict[str, bool] = {}

    def fails(drawing: Drawing) -> bool:
        if time.monotonic() > end:
            return False
        if drawing.words not in known:
            wrong: Any = refusals(drawing, fuzzer.corpora)
            if not wrong and drawing.ranks > 1:
                wrong = refusals(drawing, fuzzer.corpora, ranks=drawing.ranks)
            found = [] if wrong else fuzzer.faults(drawing, checks)
            known[drawing.words] = any(one.kind == fault.kind for one in found)
        return known[drawing.words]

    return fails
