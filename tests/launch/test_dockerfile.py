"""The images, as far as can be told without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

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
    assert "megatron-core==0.16.1; python_version < '3.12'" in lines
    assert not [line for line in lines if line.startswith(("torch", "numpy"))]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(lines) == len(project["dependencies"]) - 2


def test_a_package_that_is_no_dependency_is_named() -> None:
    done = _dependencies(str(REPOSITORY / "pyproject.toml"), "--without", "torhc")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --without: torhc not in")


# Of nvcr.io/nvidia/pytorch:26.05-py3, as those report who use it.
NVIDIA_TAG = "26.05-py3"
NVIDIA_PACKAGES = {
    "torch": "2.12.0a0+5aff3928d8.nv26.05",
    "triton": "3.7.0",
    "transformer_engine": "2.15.0+42b84005",
    "apex": "0.1",
    "flash_attn": "2.7.4.post1",
}
NVIDIA_NUMPY = "2.1.0"


def _stand_in(site_packages: Path, name: str, version: str) -> None:
    """An installed package that is nothing but its name and version."""
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("")


@pytest.mark.slow
def test_the_gpu_image_keeps_what_nvidia_installed(tmp_path: Path) -> None:
    """The pip commands of its stage, in an environment that holds its packages by name."""
    assert f"nvidia/pytorch:{NVIDIA_TAG}" in DOCKERFILE
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    pip = str(tmp_path / "venv" / "bin" / "pip")
    subprocess.run([pip, "install", "--quiet", f"numpy=={NVIDIA_NUMPY}"], check=True)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, version in NVIDIA_PACKAGES.items():
        _stand_in(site_packages, name, version)
    # As the image's own constraints: every package, too old a setuptools among them.
    (tmp_path / "constraint.txt").write_text("setuptools==70.3.0\npackaging==23.2\nwandb==0.18.0\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("conf", "mone_megatron", "tools", "pyproject.toml", "README.md", "LICENSE"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    shutil.copy(TOOL, tree)

    stage = DOCKERFILE.split("\nFROM ")[1]
    steps = re.findall(r"^RUN ((?:.*\\\n)*.*)$", stage, re.MULTILINE)
    assert len(steps) == 2
    for step in steps:
        # Not the user, nor the folder that belongs to it.
        command = step.split("&& useradd")[0].rstrip("\\\n ").replace("/tmp/", f"{tmp_path}/")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=tree,
            env=os.environ
            | {
                "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}",
                "PIP_CONSTRAINT": str(tmp_path / "constraint.txt"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    listed = subprocess.run(
        [pip, "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    there = NVIDIA_PACKAGES | {"numpy": NVIDIA_NUMPY}
    # pip writes nv26.05 as nv26.5.
    kept = [f"{name}=={Version(version)}" for name, version in there.items()]
    assert not [line for line in kept if line not in listed], listed
    assert [line for line in listed if line.startswith("mone_megatron==")]
    # Among what it says is right: that torch is new enough for the project.
    subprocess.run([pip, "check"], check=True)


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
