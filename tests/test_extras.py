"""What a tool says when an extra is not installed, and its bars where there is no terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mone_megatron.extras import require
from mone_megatron.testing.launch import REPOSITORY


def test_missing_packages_are_named_with_the_fix() -> None:
    require("hf", "torch")
    with pytest.raises(
        ValueError, match=r"^no_such_one, nor_this: needed .* pip install -e '\.\[hf\]'"
    ):
        require("hf", "torch", "no_such_one", "nor_this")


@pytest.mark.parametrize("tool", ["export_hf", "import_hf", "generate", "eval_hf"])
def test_tools_say_it_in_one_line(tool: str) -> None:
    # transformers cannot be found: as after `make quickstart` alone.
    hidden = (
        "import importlib.util, runpy, sys; real = importlib.util.find_spec;"
        "importlib.util.find_spec = "
        "lambda name, *rest: None if name == 'transformers' else real(name, *rest);"
        f"main = runpy.run_path('tools/{tool}.py')['main'];"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = {
        "export_hf": ["tests", "--output", "x"],
        "import_hf": ["tests/hf_folder", "--output", "x"],
        "generate": ["tests", "--prompt", "x"],
        "eval_hf": ["tests", "--tasks", "x"],
    }[tool]
    done = subprocess.run(
        [sys.executable, "-c", hidden, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    if tool == "import_hf":  # it looks at the folder first
        assert "tests/hf_folder: holds no config.json" in lines[0]
    else:
        assert "transformers: needed and not installed; pip install -e '.[hf]'" in lines[0]
