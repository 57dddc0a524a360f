"""Which releases of megatron-core are taken, told without importing one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest

from mone_megatron.megatron_release import megatron_release, release_problem
from mone_megatron.testing.launch import REPOSITORY, import_path


def test_the_number_is_that_of_what_is_imported() -> None:
    expected = ".".join(map(str, megatron_release()))
    assert megatron.core.__version__.split("+")[0] == expected


@pytest.mark.parametrize("release", [(0, 16, 1), (0, 19, 0), (0, 19, 2), (0, 20, 0), (1, 0, 0)])
def test_releases_that_train_right_are_taken(release: tuple[int, int, int]) -> None:
    assert release_problem(release) is None


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        ((0, 17, 0), "gradients of expert weights over the wrong ranks"),
        ((0, 17, 1), "gradients of expert weights over the wrong ranks"),
        ((0, 18, 3), "gradients of expert weights over the wrong ranks"),
        ((0, 16, 0), "older than this project knows"),
        ((0, 9, 0), "older than this project knows"),
    ],
)
def test_others_are_refused_by_name_with_the_reason(
    release: tuple[int, int, int], reason: str
) -> None:
    problem = release_problem(release)
    assert problem is not None
    assert problem.startswith("megatron-core " + ".".join(map(str, release)))
    assert reason in problem
    assert "install megatron-core 0.16.1" in problem
    assert "\n" not in problem


def _start(folder: Path, info: str) -> subprocess.CompletedProcess[str]:
    """A run that finds a megatron-core of which only this file is there."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text(info)
    # That torch is imported would show.
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    return subprocess.run(
        [sys.executable, "-m", "mone_megatron.pretrain", "experiment=tiny_mone"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": import_path(folder, REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_with_a_wrong_release_does_not_begin(tmp_path: Path) -> None:
    done = _start(tmp_path / "0.18", "MAJOR = 0\nMINOR = 18\nPATCH = 1\n")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: megatron-core 0.18.1 is refused: it reduces the gradients")
    assert done.stdout == ""
    done = _start(tmp_path / "odd", "VERSION = 3\n")
    assert done.returncode == 2
    assert "does not say megatron-core's 'MAJOR'" in done.stderr
