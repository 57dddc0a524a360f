"""Puts the definition of the selection, which training has, into the distribution.

There is one text of it, in ``mone_megatron``; what is built holds a copy whose imports are of the
copies beside it.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

_HERE = Path(__file__).resolve().parent
_SOURCE = _HERE.parents[1] / "mone_megatron"
_PACKAGE = "mone_vllm/definition"
# Package -> the files of it that are copied: the definition, and its form in Triton.
_FILES = {
    "kernels": (
        "reference.py",
        "fused.py",
        "triton_activations.py",
        "triton_glu.py",
        "triton_scores.py",
        "triton_select.py",
    ),
    "methods": (
        "bound.py",
        "options.py",
        "registry.py",
        "rule.py",
        "grouped_rows.py",
        "score.py",
        "activation.py",
        "rules/*.py",
        "scores/*.py",
        "activations/*.py",
    ),
}


def write_definition(folder: Path) -> None:
    """Writes the package ``mone_vllm.definition`` under a folder.

    Args:
        folder: where ``mone_vllm`` is.
    """
    sources = [
        path
        for package, patterns in _FILES.items()
        for pattern in patterns
        for path in sorted((_SOURCE / package).glob(pattern))
    ]
    for source in sources:
        name = source.relative_to(_SOURCE)
        text = source.read_text(encoding="utf-8")
        for package in _FILES:
            text = text.replace(f"mone_megatron.{package}", f"mone_vllm.definition.{package}")
        if "from mone_megatron" in text or "import mone_megatron" in text:
            raise ValueError(f"{source}: needs more of mone_megatron than its copy has beside it")
        path = folder / _PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    text = '"""Copied from the training package when this was built."""\n'
    for package in ("", *_FILES):
        (folder / _PACKAGE / package / "__init__.py").write_text(text, encoding="utf-8")


class BuildPackage(build_py):
    """Adds the definition to what is built from a checkout; source distributions hold it."""

    def run(self) -> None:
        """Builds, then writes."""
        super().run()
        if self.editable_mode:
            write_definition(_HERE)
        elif _SOURCE.is_dir():
            write_definition(Path(self.build_lib))


class SourceDistribution(sdist):
    """Adds the definition to the source distribution."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copies the files, then writes."""
        super().make_release_tree(base_dir, files)
        if _SOURCE.is_dir():
            write_definition(Path(base_dir))


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPackage, "sdist": SourceDistribution})
