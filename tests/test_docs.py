"""The documentation: the site builds without a warning, and every link in it leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mone_megatron.kernels.reference import topk_mask
from mone_megatron.testing.launch import import_path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
sys.path.insert(0, str(DOCS))

from plain_docstrings import plain  # noqa: E402


def _build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    return subprocess.run(
        [*command, str(source), str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": import_path(REPOSITORY), "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    built = _build(DOCS, folder)
    warnings = [line for line in built.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    advice = "a page that is in no toctree gets a line in docs/index.md; see CONTRIBUTING.md"
    assert built.returncode == 0, "\n".join([*warnings, advice]) if warnings else built.stderr
    return folder


def test_the_site_builds_without_warnings(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert pages <= built


def test_the_reference_shows_docstrings_as_they_are_written(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "layer.html").read_text(encoding="utf-8"))
    # One sentence of a function of the layer's, with its signs.
    assert "|a|" in text
    assert "\\|" not in text
    assert "Undefined substitution" not in text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (["Returns |a| of gate_TF."], [r"Returns \|a\| of gate_TF."]),
        (["Takes *args and x_."], [r"Takes \*args and x\_."]),
        (["Ranks `|a|` by :func:`rank`."], ["Ranks ``|a|`` by :func:`rank`."]),
        (["Is", "", "    a | b", "", "so."], ["Is", "", "::", "", "    a | b", "", "so."]),
        (["Args:", "    a: the *size*."], ["Args:", r"    a: the \*size\*."]),
        (["Two:", "- a", "- b"], ["Two:", "", "- a", "- b"]),
    ],
)
def test_docstrings_are_plain_text_with_code(written: list[str], shown: list[str]) -> None:
    assert plain(written) == shown


LINKS = "[a](gone_page.md) [b](#gone-heading) ![c](gone_image.png)\n\n```{toctree}\ngone_entry\n```"


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    for name in ("conf.py", "plain_docstrings.py"):
        (tmp_path / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "site.css").touch()
    (tmp_path / "index.md").write_text(f"# Title\n\n{LINKS}\n", encoding="utf-8")
    (tmp_path / "lonely.md").write_text("# Lonely\n", encoding="utf-8")
    built = _build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    for problem in ("gone_page", "gone-heading", "gone_image", "gone_entry", "lonely.md"):
        assert problem in built.stderr


def test_the_three_lines_of_the_readme_are_the_method() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines is not None
    torch.manual_seed(0)
    # So many kept that some of them have negative weights.
    hidden, neurons, kept = 8, 12, 9
    x = torch.randn(hidden)
    w_gate, w_up = torch.randn(2, hidden, neurons)
    w_down = torch.randn(neurons, hidden)
    names = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "K": kept, "silu": F.silu}
    exec(lines[1], names)
    gate_TF, up_TF = (x @ w_gate).unsqueeze(0), (x @ w_up).unsqueeze(0)
    mask_TF = topk_mask(F.silu(gate_TF).abs(), kept)
    expected_TH = (F.silu(gate_TF) * up_TF * mask_TF) @ w_down
    torch.testing.assert_close(names["y"], expected_TH[0])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert (REPOSITORY / path).exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE
            )
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert anchor in slugs, f"{name} links to {target}"
