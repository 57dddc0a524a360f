"""The images, as far as can be told without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mone_megatron.testing.launch import REPOSITORY

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
TOOL = REPOSITORY / "tools" / "dependencies.py"


def _dependencies(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )


def test_it_is_clean() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(linter), str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_path_it_names_is_there_and_let_in() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:].rstrip("/") for line in ignored if line.startswith("!")}
    assert ignored[1] == "*"
    assert all((REPOSITORY / name).exists() for name in let_in)
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    for path in {path for line in copied for path in line.split()} - {"."}:
        assert (REPOSITORY / path).is_file()
        assert path.split("/")[0] in let_in, path
    for path in re.findall(r"/opt/mone_megatron/([\w./]+)", DOCKERFILE):
        assert os.access(REPOSITORY / path, os.X_OK), path
        assert path.split("/")[0] in let_in, path
    # What setuptools reads of the project besides the package.
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"], "mone_megatron", "conf"} <= let_in


def test_images_are_pinned_and_not_root() -> None:
    images = dict(re.findall(r"^ARG (NVIDIA_PYTORCH|PYTHON)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert all(re.search(r":\d+\.\d+", image) for image in images.values())
    stages = DOCKERFILE.split("\nFROM ")[1:]
    assert [stage.split()[0] for stage in stages] == [f"${{{name}}}" for name in images]
    for stage in stages:
        assert "\nUSER 10001\n" in stage
        assert "LABEL org.opencontainers" in stage
        # torch is never among what is resolved together with the rest.
        assert "--without torch" in stage
        assert "--no-deps --editable ." in stage


def test_dependencies_but_those_that_are_there() -> None:
    done = _dependencies(str(REPOSITORY / "pyproject.toml"), "--without", "torch", "numpy")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "megatron-core==0.16.1" in lines
    assert not [line for line in lines if line.startswith(("torch", "numpy"))]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(lines) == len(project["dependencies"]) - 2


def test_a_package_that_is_no_dependency_is_named() -> None:
    done = _dependencies(str(REPOSITORY / "pyproject.toml"), "--without", "torhc")
    assert done.returncode == 2
    assert done.stderr.startswith("dependencies: --without: torhc not in")


@pytest.mark.slow
def test_the_install_step_works_in_a_clean_environment(tmp_path: Path) -> None:
    """The steps of the CPU image, then a run."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python, pip = (str(tmp_path / "venv" / "bin" / name) for name in ("python", "pip"))
    torch = re.search(r"^ARG TORCH=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert torch is not None
    subprocess.run([pip, "install", "--quiet", torch[1]], check=True)
    listed = _dependencies(str(REPOSITORY / "pyproject.toml"), "--without", "torch").stdout
    (tmp_path / "requirements.txt").write_text(listed)
    requirements = str(tmp_path / "requirements.txt")
    subprocess.run([pip, "install", "--quiet", "--requirement", requirements], check=True)
    subprocess.run([pip, "check"], check=True)
    run = [python, "-m", "mone_megatron.pretrain", "experiment=tiny_mone", "device=cpu"]
    quiet = ("train.steps=1", "logging.wandb.mode=disabled", f"run.dir={tmp_path / 'run'}")
    subprocess.run([*run, *quiet], cwd=REPOSITORY, check=True)
    assert (tmp_path / "run" / "report.html").is_file()
