"""Copies into a wheel what a checkout has beside the package; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# mone_megatron/shipped_files.py finds them again.
SHIPPED = ("conf", "launch")


class BuildWithShippedFiles(build_py):
    """The usual build, and the copies; an editable install reads the checkout's own files."""

    def run(self) -> None:
        """Builds the packages, and copies the folders beside them."""
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "mone_megatron", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / name, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
