"""Trains one drawing and reads it with every tool: what a process of the fuzzer does.

    python -m mone_megatron.testing.fuzz.trial JOB.json

It needs torchrun's variables. JOB.json says what is trained and which checks are made; what does
not hold is written to the file that it names, whatever becomes of this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch.distributed as dist

from mone_megatron.pretrain import main as pretrain
from mone_megatron.testing.fuzz import counts, exports
from mone_megatron.testing.fuzz.agreement import different, different_states
from mone_megatron.testing.fuzz.arguments import draw_call, odd_places, problem
from mone_megatron.testing.fuzz.faults import Fault
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.tools import load_tool

_KEY = re.compile(r"^error: (\S+/)?[\w./-]*\b[a-z_]+(\.[a-z_]+)+\b")
# What tools say of a copy that is not what it is a copy of: no refusal, but a finding.
_WRONG_COPY = re.compile(r"\b(differ|is missing|no place)\b")
_HALF = "step_00000002"
_TEXT = "def main():\n"
_ODD_CALLS = 10


@dataclass
class Said:
    """Holds how a command line ended, and what it said."""

    code: int | None
    out: str
    errors: str
    # Of an exception that it let through.
    traceback: str = ""

    @property
    def error_lines(self) -> list[str]:
        """Returns the lines by which it says what is wrong."""
        return [line for line in self.errors.splitlines() if line.startswith("error:")]


@dataclass
class Trial:
    """Collects what does not hold of one drawing.

    Attributes:
        overrides: those of its run, but where it goes.
        folder: for its runs and what tools write.
        checks: the names of the checks to make.
        found: what did not hold.
        made: the names of the checks that were made.
    """

    overrides: Sequence[str]
    folder: Path
    checks: Sequence[str]
    found: list[Fault] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Returns the run on one rank."""
        return self.folder / "one"

    def fault(self, check: str, what: str) -> None:
        """Notes that something does not hold."""
        self.found.append(Fault(check, what))

    def train(self) -> bool:
        """Trains, if the dry run accepts it; returns whether there is a finished run."""
        self.made.append("train")
        arguments = [*self.overrides, f"run.dir={self.run}"]
        dry = call(pretrain, [*arguments, "--dry-run"])
        with _counting_groups() as groups:
            real = call(pretrain, arguments)
        for kind, said in (("a dry run", dry), ("a run", real)):
            if said.traceback:
                self.fault("train", f"{kind} ended in a traceback: {said.traceback}")
                return False
        if dry.code == 0 and real.code == 0:
            return True
        if dry.code == 0:
            self.fault("train", f"accepted by --dry-run, and ended with {real.code}: {_told(real)}")
        elif real.code == 0:
            self.fault("train", f"refused by --dry-run, and trained: {_told(dry)}")
        elif groups:
            self.fault("train", f"refused after a process group was made: {_told(real)}")
        else:
            self.made[-1] = "refused"
            if not dry.error_lines or not all(map(_KEY.match, dry.error_lines)):
                self.fault("train", f"a refusal that names no key: {_told(dry)}")
        return False

    def resume(self) -> None:
        """Goes on from the middle, to the same bits."""
        self.made.append("resume")
        resumed = self.folder / "resumed"
        saved = self.run / "checkpoints" / _HALF
        arguments = [*self.overrides, f"run.dir={resumed}", f"checkpoint.resume={saved}"]
        said = call(pretrain, arguments)
        if said.code != 0:
            self.fault("resume", f"ended with {said.code}: {_told(said)}")
            return
        if what := different(self.run, resumed) or different_states(self.run, resumed):
            self.fault("resume", f"not the bits of the run that was not resumed: {what}")

    def count(self) -> None:
        """Compares what the planner counts with the weights that are there."""
        self.made.append("counts")
        for what in counts.problems(self.run):
            self.fault("counts", what)

    def tools(self) -> None:
        """Reads the run with the quick tools, each of which works or says what it cannot do."""
        run, here = str(self.run), self.folder
        text = ["--perplexity", run, "--max-tokens", "64", "--device", "cpu"]
        self._tool("compare_runs", [run, run, "--output", str(here / "compared")])
        self._tool("generate", [run, "--prompt", _TEXT, "--max-new-tokens", "3"])
        self._tool("eval_hf", [run, *text])
        self._tool("plan", ["--gpu", "H100", *self._elsewhere()], right=(0, 1))

    def studies(self) -> None:
        """Reads the run with the tools that draw figures, which takes them seconds."""
        run = str(self.run)
        few = ["--max-tokens", "64", "--device", "cpu"]
        out = ["--output", str(self.folder / "analysed")]
        self._tool("analyze_run", [run, "--text", run, *few, *out])
        out = ["--output", str(self.folder / "pruned"), "--shares", "0.5"]
        self._tool("sparsify_hf", [run, "--perplexity", run, *few, *out])

    def arguments(self) -> None:
        """Calls tools with arguments that cannot be: the same ones whenever it is this run."""
        self.made.append("arguments")
        random = Random(" ".join(self.overrides))
        odd, text = self.folder / "odd", self.folder / "text.txt"
        odd.mkdir()
        places = odd_places(odd)
        text.write_text(_TEXT * 40, encoding="utf-8")
        for number in range(_ODD_CALLS):
            output = str(self.folder / f"answer-{number}")
            drawn = draw_call(random, str(self.run), str(text), places, output)
            said = call(load_tool(drawn.tool), drawn.arguments)
            if what := problem(said.code, said.error_lines, said.traceback, odd):
                value = Path(drawn.value).name or repr(drawn.value)
                self.fault("arguments", f"{drawn.tool} {drawn.option} {value}: {what}")

    def _elsewhere(self) -> list[str]:
        """Returns the overrides but for the device, as a plan for a cluster has them."""
        return [one for one in self.overrides if not one.startswith(("device=", "device.threads="))]

    def export(self) -> None:
        """Exports, loads, generates, imports and exports again."""
        run, here = str(self.run), self.folder
        written, ours, again = here / "hf", here / "imported", here / "again"
        if not self._tool("export_hf", [run, "--output", str(written)]):
            return
        self._guarded("export", lambda: exports.loading_problems(written))
        self._guarded("export", lambda: exports.decoding_problems(written))
        if not self._tool("import_hf", [str(written), "--output", str(ours)]):
            return
        if self._tool("export_hf", [str(ours), "--output", str(again)]):
            self._guarded("export", lambda: exports.file_problems(written, again))

    def _guarded(self, check: str, problems: Callable[[], Sequence[str]]) -> None:
        try:
            found = problems()
        except Exception:
            found = [f"a traceback: {_last(traceback.format_exc())}"]
        for what in found:
            self.fault(check, what)

    def _tool(self, name: str, arguments: Sequence[str], *, right: Sequence[int] = (0,)) -> bool:
        """Runs a tool; returns whether it did what it is for."""
        self.made.append(name)
        said = call(load_tool(name), arguments)
        if said.traceback:
            self.fault(name, f"a traceback: {said.traceback}")
        elif said.code in right:
            return True
        elif said.code != 2 or not said.error_lines:
            self.fault(name, f"ended with {said.code}: {_told(said)}")
        elif _WRONG_COPY.search(said.errors):
            self.fault(name, _told(said))
        else:
            self.made[-1] = f"{name} refused"
        return False


def call(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> Said:
    """Calls a command line in this process, as by itself: with a port and a world of its own."""
    os.environ["MASTER_PORT"] = str(free_ports(1)[0])
    out, errors = io.StringIO(), io.StringIO()
    code: int | None = None
    trace = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            trace = _last(traceback.format_exc())
    if not trace and "Traceback (most recent call last)" in errors.getvalue():
        trace = _last(errors.getvalue())
    # A run that failed leaves its group; the next makes one.
    if dist.is_initialized():
        dist.destroy_process_group()
    return Said(code, out.getvalue(), errors.getvalue(), trace)


def _last(trace: str) -> str:
    """Returns where a traceback ends, and in what."""
    lines = trace.strip().splitlines()
    ours = [line.strip() for line in lines if re.match(r'\s*File ".*mone_megatron', line)]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    where = re.sub(r'File ".*/(mone_megatron/)', r'"\1', ours[-1]) if ours else ""
    return f"{(errors or lines)[-1]} ({where})"


def _told(said: Said) -> str:
    lines = said.error_lines or said.errors.strip().splitlines()[-3:]
    return " | ".join(lines)


@contextlib.contextmanager
def _counting_groups() -> Iterator[list[int]]:
    """Notes in a list that process groups are made."""
    made: list[int] = []
    make = dist.init_process_group

    def noted(*arguments: Any, **named: Any) -> Any:
        made.append(1)
        return make(*arguments, **named)

    dist.init_process_group = noted
    try:
        yield made
    finally:
        dist.init_process_group = make


def _try(trial: Trial) -> None:
    checks: Mapping[str, Callable[[], None]] = {
        "resume": trial.resume,
        "counts": trial.count,
        "tools": trial.tools,
        "studies": trial.studies,
        "arguments": trial.arguments,
        "export": trial.export,
    }
    if trial.train():
        for name in trial.checks:
            checks[name]()


def main() -> int:
    """Makes the trial of a file and writes what does not hold."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    trial = Trial(job["overrides"], Path(job["folder"]), job["checks"])
    try:
        _try(trial)
    except BaseException:
        trial.fault("trial", f"a traceback: {_last(traceback.format_exc())}")
        raise
    finally:
        told = {"found": [asdict(fault) for fault in trial.found], "made": trial.made}
        Path(job["result"]).write_text(json.dumps(told), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
