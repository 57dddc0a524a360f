"""Lists what is run with each version and compared, and how each is measured.

Everything goes through the command lines and the files of a run. Data are the source of the Python
standard library, prepared by each version for itself; all is computed in fp32 on one thread.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.testing.commit_comparison.differences import Measured
from mone_megatron.testing.commit_comparison.values import (
    Values,
    checkpoint_values,
    file_values,
    folder_values,
    run_values,
)
from mone_megatron.testing.commit_comparison.version import Version
from mone_megatron.testing.layouts import LAYOUTS, PARTS
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.words import write_words

# Scripts that processes of either version run; they import nothing of ours.
RUNS_IN_TURN = Path(__file__).with_name("runs_in_turn.py")
EXPORT_LOGITS = Path(__file__).with_name("export_logits.py")
# Folders below ``Version.work``: the runs of BASE that HEAD is to read, and who made them.
GIVEN = Path("given")
GIVEN_BY = "one_process"
EXPERIMENTS = ("tiny_moe", "tiny_mone")

_FIXED = (
    "device=cpu",
    "device.dtype=fp32",
    "device.threads=1",
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "logging.layer_interval=1",
    "train.steps=20",
    "train.eval_interval=10",
    "train.eval_steps=1",
    "checkpoint.interval=20",
)
_SAVED_HALF_WAY = "checkpoint.interval=10"
_HALF_WAY = "step_00000010"
# Layouts of 2 processes that `--quick` tries; the others are left to the whole comparison.
_QUICK_LAYOUTS = ("dp2", "ep2")

Rows = dict[str, Measured]


@dataclass(frozen=True)
class Measurement:
    """Describes some commands, and the things that are compared after them.

    Attributes:
        name: also of the folder that it writes, below ``Version.work``.
        rows: the things.
        measure: runs the commands; a row that it leaves out is one that failed.
        quick: whether it belongs to ``--quick``.
        needs: names of those whose files it reads, of the same version.
        reads_base: whether it reads BASE's runs in ``GIVEN``.
        settings: what ``measure`` is given from elsewhere; with another what was measured before
            is of no use.
    """

    name: str
    rows: tuple[str, ...]
    measure: Callable[[Version, str], Rows]
    quick: bool = False
    needs: tuple[str, ...] = ()
    reads_base: bool = False
    settings: str = ""


def measurements() -> dict[str, Measurement]:
    """Returns all of them by name, in the order in which they are run."""
    listed = [
        _training(
            "one_process",
            {f"{name}, 1 process": (f"experiment={name}", _SAVED_HALF_WAY) for name in EXPERIMENTS},
            processes=1,
            quick=True,
            keep=True,
        ),
        _training(
            "two_processes",
            {
                f"{experiment}, {layout}": (f"experiment={experiment}", *LAYOUTS[2][layout])
                for experiment in EXPERIMENTS
                for layout in _QUICK_LAYOUTS
            },
            processes=2,
            quick=True,
        ),
        Measurement(
            "export",
            ("export of its own tiny_mone",),
            _export_own("tiny_mone"),
            quick=True,
            needs=(GIVEN_BY,),
        ),
        _resuming("resume", {"resumed on 1 process": ()}, processes=1, quick=True),
        Measurement(
            "export_of_base",
            ("BASE's tiny_mone: export", "BASE's tiny_mone: logits of the export"),
            _export_base,
            quick=True,
            reads_base=True,
        ),
        _resuming(
            "resume_on_two",
            {f"resumed as {layout}": LAYOUTS[2][layout] for layout in _QUICK_LAYOUTS},
            processes=2,
        ),
        Measurement(
            "tools_on_base",
            (
                "BASE's tiny_mone: kept neurons",
                "BASE's tiny_mone: analyze_run",
                "BASE's runs: compare_runs",
                "BASE's runs: eval_hf",
                "BASE's tiny_mone: generate",
                "BASE's tiny_moe: export",
                "BASE's tiny_moe: import_hf of the export",
            ),
            _tools_on_base,
            reads_base=True,
        ),
        Measurement("preprocess", ("preprocess_data",), _preprocess),
        Measurement(
            "quickstart",
            ("quickstart_mone, python -m", "quickstart_mone, torchrun of 2"),
            _quickstart,
        ),
        *(
            _training(
                f"layouts_of_{experiment}_on_{processes}",
                {
                    f"{experiment}, {layout}": (f"experiment={experiment}", *settings)
                    for layout, settings in layouts.items()
                    if layout not in ("one", *_QUICK_LAYOUTS)
                },
                processes=processes,
            )
            for experiment in EXPERIMENTS
            for processes, layouts in LAYOUTS.items()
        ),
        *(
            _training(
                f"parts_on_{processes}",
                {
                    f"{name} on {processes}": (
                        "experiment=tiny_mone",
                        *settings,
                        *(layout if processes > 1 else ()),
                    )
                    for name, (settings, layout) in PARTS.items()
                },
                processes=processes,
            )
            for processes in (1, 2)
        ),
    ]
    return {measurement.name: measurement for measurement in listed}


def _training(
    name: str,
    jobs: Mapping[str, Sequence[str]],
    *,
    processes: int,
    quick: bool = False,
    keep: bool = False,
    reads_base: bool = False,
) -> Measurement:
    """Returns a measurement of runs of 20 steps, in turn in the same processes; a row for each."""

    def measure(version: Version, folder: str) -> Rows:
        return _train(version, folder, jobs, processes=processes, keep=keep)

    return Measurement(
        name,
        tuple(jobs),
        measure,
        quick=quick,
        reads_base=reads_base,
        settings=repr((dict(jobs), processes)),
    )


def _resuming(
    name: str, layouts: Mapping[str, Sequence[str]], *, processes: int, quick: bool = False
) -> Measurement:
    """Returns a measurement of BASE's tiny_mone, resumed from the checkpoint of its tenth step."""
    checkpoint = given_run("tiny_mone") / "checkpoints" / _HALF_WAY
    jobs = {
        f"BASE's tiny_mone: {what}": (
            "experiment=tiny_mone",
            *layout,
            f"checkpoint.resume={checkpoint}",
        )
        for what, layout in layouts.items()
    }
    return _training(name, jobs, processes=processes, quick=quick, reads_base=True)


def given_run(experiment: str) -> Path:
    """Returns where BASE's run of an experiment lies, relative to ``Version.work``."""
    return GIVEN / _slug(f"{experiment}, 1 process")


def _slug(what: str) -> str:
    return what.replace(", ", "-").replace(" ", "_").replace("'", "").replace(":", "")


def _train(
    version: Version,
    folder: str,
    jobs: Mapping[str, Sequence[str]],
    *,
    processes: int,
    keep: bool,
) -> Rows:
    runs = {what: Path(folder, _slug(what)) for what in jobs}
    ports = free_ports(len(jobs))
    listed = [
        {"arguments": [*_FIXED, *overrides, f"run.dir={runs[what]}"], "port": port}
        for (what, overrides), port in zip(jobs.items(), ports, strict=True)
    ]
    job_file = version.work / folder / "jobs.json"
    job_file.write_text(json.dumps(listed), encoding="utf-8")
    command = [sys.executable, _script(version, RUNS_IN_TURN), str(job_file)]
    rows: Rows = {}
    error = ""
    try:
        version.run(command, log=folder, ranks=processes)
    except RuntimeError as failure:
        error = str(failure)
    for what, run in runs.items():
        whole = version.work / run
        rows[what] = _measured(lambda whole=whole: run_values(whole), error)  # type: ignore[misc]
        if not keep:
            shutil.rmtree(whole / "checkpoints", ignore_errors=True)
    return rows


def _measured(read: Callable[[], Values], error: str = "") -> Measured:
    """Returns the values that were read, or why there are none.

    Args:
        read: gives the values.
        error: of a command before; it is told when they cannot be read, and stands for it.
    """
    try:
        return Measured(read())
    except (RuntimeError, OSError, ValueError, LookupError) as failure:
        return Measured({}, error or f"{type(failure).__name__}: {failure}")


def _script(version: Version, source: Path) -> str:
    """Copies a script into the work folder, beside which nothing of ours can be imported, and
    returns the copy's path.
    """
    target = version.work / source.name
    shutil.copyfile(source, target)
    return str(target)


def _export(version: Version, run: Path, output: Path, log: str) -> Values:
    version.run(version.tool("export_hf", str(run), "--output", str(output)), log=log)
    return folder_values(version.work / output)


def _export_own(experiment: str) -> Callable[[Version, str], Rows]:
    def measure(version: Version, folder: str) -> Rows:
        run = Path(GIVEN_BY, _slug(f"{experiment}, 1 process"))
        what = f"export of its own {experiment}"
        return {what: _measured(lambda: _export(version, run, Path(folder, experiment), folder))}

    return measure


def _export_base(version: Version, folder: str) -> Rows:
    export, logits = Path(folder, "tiny_mone"), Path(folder, "logits.npz")

    def compute_logits() -> Values:
        script = _script(version, EXPORT_LOGITS)
        version.run([sys.executable, script, str(export), str(logits)], log=f"{folder}-logits")
        return file_values(version.work / logits, "logits")

    what = "BASE's tiny_mone"
    return {
        f"{what}: export": _measured(
            lambda: _export(version, given_run("tiny_mone"), export, folder)
        ),
        f"{what}: logits of the export": _measured(compute_logits),
    }


def _tools_on_base(version: Version, folder: str) -> Rows:
    moe, mone = str(given_run("tiny_moe")), str(given_run("tiny_mone"))

    def output(name: str) -> str:
        return str(Path(folder, name))

    def run(tool: str, *arguments: str) -> str:
        return version.run(version.tool(tool, *arguments), log=f"{folder}-{tool}")

    def kept_neurons() -> Values:
        run(
            "analyze_run",
            *(mone, "--text", mone, "--max-tokens", "1024"),
            *("--output", output("routing"), "--trace", output("traces")),
        )
        return folder_values(version.work / output("traces"))

    def evaluated() -> Values:
        file = output("evaluation.json")
        run("eval_hf", moe, mone, "--perplexity", moe, "--max-tokens", "2048", "--json", file)
        return file_values(version.work / file, "evaluation.json")

    def compared() -> Values:
        run("compare_runs", moe, mone, "--output", output("comparison"))
        return folder_values(version.work / output("comparison"))

    def imported() -> Values:
        run("import_hf", output("export_moe"), "--output", output("imported"))
        checkpoint = version.work / output("imported") / "checkpoints" / "step_00000000"
        return checkpoint_values(checkpoint)

    prompt = ("--prompt", "def main(", "--max-new-tokens", "24")
    of_mone, of_moe, of_both = "BASE's tiny_mone", "BASE's tiny_moe", "BASE's runs"
    return {
        f"{of_mone}: kept neurons": _measured(kept_neurons),
        f"{of_mone}: analyze_run": _measured(
            lambda: folder_values(version.work / output("routing"))
        ),
        f"{of_both}: compare_runs": _measured(compared),
        f"{of_both}: eval_hf": _measured(evaluated),
        f"{of_mone}: generate": _measured(lambda: {"text": run("generate", mone, *prompt)}),
        f"{of_moe}: export": _measured(
            lambda: _export(version, Path(moe), Path(output("export_moe")), f"{folder}-export_moe")
        ),
        f"{of_moe}: import_hf of the export": _measured(imported),
    }


def _preprocess(version: Version, folder: str) -> Rows:
    words = str(write_words(version.work / folder / "words.jsonl").relative_to(version.work))
    prefix = str(Path(folder, "corpus", "words"))

    def preprocessed() -> Values:
        arguments = (words, "--output", prefix, "--train-tokenizer", "512")
        version.run(version.tool("preprocess_data", *arguments), log=folder)
        return folder_values(version.work / folder / "corpus")

    return {"preprocess_data": _measured(preprocessed)}


def _quickstart(version: Version, folder: str) -> Rows:
    """Trains as a user starts it, once in each of the two ways; the corpus is cut to 3 MB."""
    launchers: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "python -m": (("-m",), ("parallel.expert=1",)),
        "torchrun of 2": (
            ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"),
            (),
        ),
    }
    rows: Rows = {}
    for name, (launcher, layout) in launchers.items():
        what = f"quickstart_mone, {name}"
        run = Path(folder, _slug(what))
        shorter = ("data.max_megabytes=3", "optim.warmup_steps=5")
        job = ("experiment=quickstart_mone", *shorter, *_FIXED, *layout)
        command = [sys.executable, *launcher, "mone_megatron.pretrain", *job, f"run.dir={run}"]

        def measure(command: list[str] = command, run: Path = run) -> Values:
            version.run(command, log=run.name)
            return run_values(version.work / run)

        rows[what] = _measured(measure)
        shutil.rmtree(version.work / run / "checkpoints", ignore_errors=True)
    return rows
