"""A fresh copy of the repository, in which a reader's commands can be run as they are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from mone_megatron.testing.launch import REPOSITORY, import_path


def copy_repository(folder: Path) -> dict[str, str]:
    """Copies what git knows or would add, and returns the environment of commands there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)
            shutil.copymode(REPOSITORY / name, folder / name)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": import_path(folder),
        "OMP_NUM_THREADS": "1",
    }
