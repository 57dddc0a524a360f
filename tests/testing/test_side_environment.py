"""An environment in which another megatron-core is found by whatever process a test starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mone_megatron.megatron_release import megatron_release
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.processes import run_in_processes
from mone_megatron.testing.side_environment import main, make_side_environment
from mone_megatron.testing.warm_start import run_python

LOOK = (
    "import json, sys; from mone_megatron.megatron_release import megatron_release; "
    "import yaml; print(json.dumps([sys.prefix, *megatron_release()]))"
)


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose megatron-core says that it is 0.99.7."""
    folder = tmp_path_factory.mktemp("side")
    core = folder / "packages" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 99\nPATCH = 7\n", encoding="utf-8")
    python = make_side_environment(folder / "environment", folder / "packages")
    assert python == folder / "environment" / "bin" / "python"
    return folder / "environment"


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ([], dict(os.environ) | {"PYTHONPATH": str(REPOSITORY)}),
        ([], {"PYTHONPATH": str(REPOSITORY)}),
        ([], {}),
        (["-E"], dict(os.environ)),
        (["-I"], dict(os.environ)),
    ],
    ids=["inherits", "ours-alone", "nothing", "ignores", "isolated"],
)
def test_processes_find_it_whatever_they_are_handed(
    side: Path, options: list[str], variables: dict[str, str]
) -> None:
    done = subprocess.run(
        [str(side / "bin" / "python"), *options, "-c", LOOK],
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [str(side), 0, 99, 7]


def test_scripts_are_run_by_its_interpreter(side: Path) -> None:
    ours = Path(sys.executable).with_name("lint-imports").read_text(encoding="utf-8")
    done = subprocess.run(
        [str(side / "bin" / "lint-imports"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--no-cache" in done.stdout
    theirs = (side / "bin" / "lint-imports").read_text(encoding="utf-8")
    assert theirs.startswith(f"#!{side}/bin/python")
    assert theirs.splitlines()[1:] == ours.splitlines()[1:]
    # Programs that are no script are this environment's.
    assert (side / "bin" / "ruff").resolve() == Path(sys.executable).with_name("ruff").resolve()


def test_a_run_that_is_asked_for_another_release_does_not_begin() -> None:
    found = ".".join(map(str, megatron_release()))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--megatron", "0.99.7", "--collect-only", __file__],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "--megatron 0.99.7: " in done.stderr
    assert f" is {found}; use the python of an environment that has it" in done.stderr


def _release_here() -> tuple[str, str]:
    import megatron.core

    return megatron.core.__version__, str(megatron.core.__file__)


def test_every_kind_of_process_that_tests_start_has_the_release_of_the_tests() -> None:
    here = _release_here()
    code = "import megatron.core as m; print(m.__version__, m.__file__, sep='\\n')"
    assert run_python(["-c", code], folder=REPOSITORY).stdout.splitlines() == list(here)
    assert run_in_processes(1, _release_here) == [here]
    # One that is handed no variables imports no torch here: it only looks.
    look = "from mone_megatron.megatron_release import megatron_folder; print(megatron_folder())"
    for variables in ({}, {"PYTHONPATH": str(REPOSITORY)}):
        done = subprocess.run(
            [sys.executable, "-c", look],
            cwd=REPOSITORY,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert Path(done.stdout.strip()) == Path(here[1]).parent, (
            "a megatron-core of PYTHONPATH is lost with it: run these tests by the python of an "
            "environment that has it (make test-megatron-next makes one)"
        )


@pytest.mark.parametrize(
    ("environment", "packages", "says"),
    [
        ("new", "nowhere", "nowhere: not a folder; name the one that holds the packages"),
        ("new", "packages/file", "file: not a folder; name the one that holds the packages"),
        ("packages", "packages", "packages: it is there and no environment; name another folder"),
        (sys.prefix, "packages", "it is this environment; name another folder"),
    ],
)
def test_what_it_refuses(
    environment: str,
    packages: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert main([environment, packages]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packages"]
    assert main([environment]) == 2
    assert capsys.readouterr().err == "error: two folders are needed, ENVIRONMENT and PACKAGES\n"
