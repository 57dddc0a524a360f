"""docs/extending.md, word for word: its package is installed, and its commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_registries import REGISTRIES

from mone_megatron.testing.launch import REPOSITORY, import_path, run_layouts

GUIDE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {
    match[1]: match[2]
    for match in re.finditer(r"```python\n# (\S+\.py)\n(.*?)```", GUIDE, re.DOTALL)
}
COMMANDS = re.findall(r"^python -m mone_megatron\.pretrain (.*)$", GUIDE, re.MULTILINE)
QUICK = (
    "train.steps=2", "data.max_megabytes=0.2", "logging.wandb.mode=disabled",
    "logging.report=false", "logging.progress=none", "model.vocab_size=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip would have put the guide's package."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "my_methods" / "__init__.py").touch()
    entries = re.search(
        r"```toml\n\[project\.entry-points\.\"(.*?)\"\]\n(.*?)```", GUIDE, re.DOTALL
    )
    assert entries is not None
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_methods\nVersion: 1.0\n")
    lines = entries[2].replace('"', "")
    (info / "entry_points.txt").write_text(f"[{entries[1]}]\n{lines}")
    return folder


def test_the_guide_has_an_example_of_each_kind() -> None:
    assert len(COMMANDS) == len(REGISTRIES) == 11
    # The optimizer has its class beside it.
    assert len(FILES) == len(COMMANDS) + 1


def test_its_commands_train(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", import_path(REPOSITORY, site))
    jobs = {f"run{number}": (*line.split(), *QUICK) for number, line in enumerate(COMMANDS)}
    run_layouts(jobs, processes=1, folder=tmp_path)
    for name in jobs:
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 2


def test_wrong_options_are_named(site: Path) -> None:
    environment = os.environ | {"PYTHONPATH": import_path(REPOSITORY, site)}
    for override, message in (
        ("mone.rule_options.rate=0", "mone.rule_options.rate: 0 is not above 0"),
        ("mone.rule_options.rate=fast", "mone.rule_options.rate: expected a number"),
        ("mone.rule_options.speed=1", "mone.rule_options.speed: unknown key"),
        ("parallel.expert_tensor=2", "mone.rule=threshold_example cannot select over ranks"),
        (
            "model.router.options.scale=0",
            "model.router.options.scale: 0 is not positive; use a number above 0",
        ),
        (
            "model.router.options.scale=wide",
            "model.router.options.scale: expected a number",
        ),
        ("model.router.options.rank=2", "model.router.options.rank: unknown key"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "mone_megatron.pretrain", "experiment=tiny_mone", "device=cpu",
             "mone.rule=threshold_example", "model.router.kind=cosine_example", override],
            capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY,
        )  # fmt: skip
        assert run.returncode == 2, run.stderr
        assert message in run.stderr


# Trains every method of the registries once more: minutes.
@pytest.mark.slow
def test_the_suite_runs_over_them(site: Path) -> None:
    environment = os.environ | {"PYTHONPATH": import_path(REPOSITORY, site)}
    names = [
        "gate_product",
        "threshold_example",
        "softplus",
        "entropy_example",
        "cosine_example",
        "lion_example",
        "tail_example",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/methods", "-k", " or ".join(names), "-rp"],
        capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    # -rp names each test that passed.
    passed = [line for line in run.stdout.splitlines() if line.startswith("PASSED ")]
    assert all(any(name in line for line in passed) for name in names)
