"""The notebooks run from their first cell to their last, in a fresh copy of the repository."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from repository_copy import copy_repository

from mone_megatron.testing.launch import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    nbformat.validate(nbformat.read(notebook, as_version=4))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


# Three trainings, an export and a fine-tuning: eleven minutes on one core.
_SECONDS = 3600


@pytest.mark.slow
@pytest.mark.timeout(_SECONDS)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in copy_repository(tmp_path).items():
        monkeypatch.setenv(name, value)
    document = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        document, timeout=_SECONDS, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in document.cells for output in cell.get("outputs", [])
    )
    # A shell command that fails does not end a notebook.
    assert "error:" not in printed, printed
    assert "all checked, nothing trained" in printed
    assert "held out, after" in printed
    assert (tmp_path / "exports" / "notebook_lora" / "adapter_model.safetensors").is_file()
