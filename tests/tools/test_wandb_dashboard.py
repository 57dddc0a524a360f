"""The dashboard shows what runs record, and W&B's own package takes it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mone_megatron.testing.launch import REPOSITORY


def _tool() -> ModuleType:
    path = REPOSITORY / "tools" / "wandb_dashboard.py"
    specification = importlib.util.spec_from_file_location("wandb_dashboard", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tool = _tool()
DASHBOARD = REPOSITORY / "docs" / "dashboard.yaml"


def test_every_metric_it_shows_is_documented() -> None:
    """docs/metrics.md is held to what runs record by tests/integration/test_pretrain.py."""
    guide = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set()
    for row in re.findall(r"^\| (`.+?) \|", guide, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", row)
        # `router/tokens_per_expert_min`, `_mean`, ...
        stem = names[0].rsplit("_", 1)[0]
        documented |= {stem + name if name.startswith("_") else name for name in names}
    shown = {
        metric
        for section in tool.read_sections(DASHBOARD)
        for plot in section["plots"]
        for metric in plot["metrics"]
    }
    assert shown <= documented, sorted(shown - documented)
    assert {"loss", "val_loss", "mone/load_entropy", "router/dead_experts"} <= shown


def test_wandb_takes_it() -> None:
    pytest.importorskip("wandb_workspaces")
    sections = tool.read_sections(DASHBOARD)
    workspace = tool.build_workspace(sections, entity="me", project="p")
    model = workspace._to_model()
    assert [section.name for section in workspace.sections] == [one["section"] for one in sections]
    text = model.model_dump_json()
    for section in sections:
        for plot in section["plots"]:
            assert all(metric in text for metric in plot["metrics"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1", "expected a list of sections"),
        ("- section: a", "give it `section` and `plots`"),
        ("- {section: a, plots: [{title: b}]}", "needs `title` and `metrics`"),
        ("- {section: a, plots: [{title: b, metrics: [loss], colour: red}]}", "may have"),
        ("- [", "dashboard.yaml"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    path = tmp_path / "dashboard.yaml"
    path.write_text(content)
    assert tool.main(["--print", "--file", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_printing_needs_no_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert tool.main(["--print"]) == 0
    assert "training loss" in capsys.readouterr().out
    assert tool.main(["--entity", "me"]) == 2
    assert "mone_megatron[dashboard]" in capsys.readouterr().err
    assert tool.main([]) == 2
    assert "--entity" in capsys.readouterr().err
