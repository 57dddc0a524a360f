"""tools/compare_commits.py: what counts as a difference, what is run, and that nothing is left."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_megatron.testing.commit_comparison.comparison import choose
from mone_megatron.testing.commit_comparison.differences import (
    Measured,
    compare,
    compare_one,
    summary,
    table,
)
from mone_megatron.testing.commit_comparison.measurements import GIVEN_BY, measurements
from mone_megatron.testing.commit_comparison.values import Scalar, file_values, flatten, run_values
from mone_megatron.testing.commit_comparison.version import (
    CommandFailedError,
    Version,
    find_revision,
    sources,
)
from mone_megatron.testing.launch import REPOSITORY, import_path
from mone_megatron.testing.layouts import LAYOUTS, PARTS
from mone_megatron.testing.tools import load_tool


@pytest.mark.parametrize(
    ("base", "head", "status"),
    [
        (6.25, 6.25, "equal"),
        (6.25, math.nextafter(6.25, 7), "different"),
        (0.0, -0.0, "different"),
        (math.nan, math.nan, "equal"),
        (math.nan, 1.0, "different"),
        (1, 1.0, "different"),
        (1, True, "different"),
        (None, None, "equal"),
        (None, "None", "different"),
        ("a", "b", "different"),
    ],
)
def test_values_are_equal_when_their_bits_are(base: Scalar, head: Scalar, status: str) -> None:
    assert compare_one("x", Measured({"v": base}), Measured({"v": head})).status == status


def test_the_first_difference_is_told_with_both_values() -> None:
    base = {"step 1 loss": 6.5, "step 2 loss": 6.25, "step 3 loss": 6.0}
    outcome = compare_one(
        "run", Measured(base), Measured(base | {"step 3 loss": 1, "step 2 loss": 0.1})
    )
    assert outcome.differing == ("step 2 loss", "step 3 loss")
    assert outcome.detail == (
        f"step 2 loss: BASE {(6.25).hex()} (6.25), HEAD {(0.1).hex()} (0.1) (and 1 more)"
    )


def test_what_head_lacks_is_a_difference_and_what_it_adds_is_told() -> None:
    two, one = Measured({"a": 1, "b": 2}), Measured({"a": 1})
    lacking, adding = compare_one("x", two, one), compare_one("x", one, two)
    assert (lacking.status, lacking.detail) == ("different", "b: BASE 2, HEAD absent")
    assert (adding.status, adding.detail) == ("equal", "HEAD adds 1: b")


@pytest.mark.parametrize("failed", ["base", "head", "both"])
def test_what_failed_proves_nothing(failed: str) -> None:
    whole, broken = Measured({"a": 1}), Measured({}, "out of memory")
    base = whole if failed == "head" else broken
    head = whole if failed == "base" else broken
    outcomes = compare({"run": base, "other": whole}, {"run": head, "other": whole})
    assert [outcome.status for outcome in outcomes] == ["not compared", "equal"]
    assert "out of memory" in table(outcomes)
    assert summary(outcomes).startswith("NOT EQUAL: 1 of 2")
    assert summary(outcomes[1:]).startswith("EQUAL")


def test_times_are_no_values_and_arrays_are_compared_by_type_shape_and_bytes() -> None:
    record = {"loss": 1.5, "step_seconds": 2.0, "tokens_per_second": 9.0, "tflops_ideal": 1.0}
    assert flatten("step 1", record) == {"step 1 loss": 1.5}
    state = {"layers": [{"weight": torch.zeros(2)}, {"weight": torch.zeros(2, 1)}], "none": ()}
    values = flatten("state", state)
    assert list(values) == ["state layers[0] weight", "state layers[1] weight", "state none"]
    kinds = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32), np.ones(2)]
    assert len({str(flatten("x", kind)["x"]) for kind in kinds}) == len(kinds)
    assert flatten("x", torch.tensor([0.0])) != flatten("x", torch.tensor([-0.0]))
    with pytest.raises(ValueError, match="x a: a set"):
        flatten("x", {"a": {1}})


def test_files_are_compared_by_what_they_say(tmp_path: Path) -> None:
    for name, text in {"a.json": '{"k": [1, 2.5]}', "b.yaml": "k: [1, 2.5]", "c.txt": "k"}.items():
        (tmp_path / name).write_text(text)
    np.savez(tmp_path / "d.npz", x=np.arange(3))
    assert file_values(tmp_path / "a.json", "f") == {"f k[0]": 1, "f k[1]": 2.5}
    assert file_values(tmp_path / "b.yaml", "f") == {"f k[0]": 1, "f k[1]": 2.5}
    assert "1 bytes, SHA-256" in str(file_values(tmp_path / "c.txt", "f")["f"])
    assert list(file_values(tmp_path / "d.npz", "f")) == ["f x"]


def test_a_run_that_did_not_complete_has_no_values(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "failed"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 6.0}\n')
    with pytest.raises(ValueError, match="failed"):
        run_values(tmp_path)


def test_every_layout_and_part_is_measured() -> None:
    rows = [row for one in measurements().values() for row in one.rows]
    assert len(set(rows)) == len(rows)
    for experiment in ("tiny_moe", "tiny_mone"):
        for layouts in LAYOUTS.values():
            for layout in layouts:
                name = "1 process" if layout == "one" else layout
                assert f"{experiment}, {name}" in rows
    assert {f"{part} on {processes}" for part in PARTS for processes in (1, 2)} <= set(rows)


def test_what_is_chosen_comes_with_what_it_needs() -> None:
    assert [one.name for one in choose(quick=False, only=["export_of_base"])] == [
        GIVEN_BY,
        "export_of_base",
    ]
    quick = [one.name for one in choose(quick=True)]
    assert GIVEN_BY in quick
    assert len(quick) < len(choose(quick=False)) == len(measurements())


def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("compare_commits")
    cases: dict[tuple[str, ...], tuple[str, ...]] = {
        ("no-such-commit",): ("no-such-commit", "hash, branch or tag"),
        ("HEAD", "no-such-head"): ("no-such-head", "hash, branch or tag"),
        ("HEAD", "--only", "everything"): ("--only", "everything", "one_process"),
        ("HEAD", "--output", str(tmp_path / "none" / "x.json")): ("--output", "none"),
    }
    (tmp_path / "file").write_text("")
    cases[("HEAD", "--cache", str(tmp_path / "file"))] = ("--cache", "Not a directory")
    for arguments, named in cases.items():
        assert tool(["--cache", str(tmp_path / "cache"), *arguments]) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1
        assert all(part in error for part in named), error


def _git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    subprocess.run(["git", "-C", str(repository), *identity, *arguments], check=True)


def test_the_working_tree_is_taken_as_it_is_and_nothing_stays(tmp_path: Path) -> None:
    repository, folder = tmp_path / "repository", tmp_path / "worktree"
    repository.mkdir()
    _git(repository, "init", "--quiet")
    for name in ("kept", "changed", "deleted", ".gitignore"):
        (repository / name).write_text("ignored\n" if name == ".gitignore" else "1")
    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message", "First")
    (repository / "changed").write_text("2")
    (repository / "new").write_text("3")
    (repository / "ignored").write_text("4")
    (repository / "deleted").unlink()

    def contents(name: str | None) -> dict[str, str]:
        with sources(repository, find_revision(repository, name), folder) as tree:
            paths = [path for path in tree.iterdir() if not path.name.startswith(".git")]
            return {path.name: path.read_text() for path in paths}

    assert contents(None) == {"kept": "1", "changed": "2", "new": "3"}
    assert contents("HEAD") == {"kept": "1", "changed": "1", "deleted": "1"}
    with pytest.raises(KeyError), sources(repository, find_revision(repository, None), folder):
        raise KeyError
    assert not folder.exists()
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True
    )
    assert len(listed.stdout.splitlines()) == 1


def test_a_command_that_fails_is_told_and_all_that_it_started_is_ended(tmp_path: Path) -> None:
    version = Version(tmp_path, tmp_path)
    script = (
        'sleep 600 & echo $! > child-$RANK; test $RANK = 1 && echo "no memory" >&2 && exit 3; wait'
    )
    with pytest.raises(CommandFailedError, match=r"job ended with 3:\nno memory"):
        version.run(["sh", "-c", script], log="job", ranks=2)
    children = [int(path.read_text()) for path in tmp_path.glob("child-*") if path.read_text()]
    assert children
    deadline = time.monotonic() + 300
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_version_equals_itself_and_a_planted_constant_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, repository / name)
    _git(repository, "init", "--quiet")
    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message", "First")

    def compared(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repository / "tools" / "compare_commits.py"), *arguments]
        return subprocess.run(
            [*command, "--only", "one_process", "--cache", str(tmp_path / "cache")],
            env=os.environ | {"PYTHONPATH": import_path(repository)},
            capture_output=True,
            text=True,
            check=False,
        )

    same = compared("HEAD", "HEAD")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "EQUAL: all" in same.stdout

    experiment = repository / "conf" / "experiment" / "tiny_moe.yaml"
    text = experiment.read_text(encoding="utf-8")
    assert "eps: 1e-5" in text
    experiment.write_text(text.replace("eps: 1e-5", "eps: 1.1e-5"), encoding="utf-8")
    planted = compared("HEAD")
    assert planted.returncode == 1, planted.stdout + planted.stderr
    assert "1 of 1 measurements were in" in planted.stderr
    # The first update is the first to use it.
    for name in ("tiny_moe", "tiny_mone"):
        line = next(line for line in planted.stdout.splitlines() if line.startswith(f"{name},"))
        assert "DIFFERENT: step 2 loss: BASE 0x1." in line
