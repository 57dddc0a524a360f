"""transformers' own tests of every model class, from the source distribution of what is installed.

Nothing of them lies here: pip fetches the distribution into ``.cache`` of the repository when the
suite first runs. It holds the common tests, but neither the tests of generation nor of exporters,
from which they inherit: those have empty classes here, and are left out.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import transformers

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers_suite"
# The name of their package here, since ours is called tests, too.
_PACKAGE = "transformers_tests"
# File of theirs that is not distributed -> the class that the common tests import from it.
_LEFT_OUT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def load() -> ModuleType:
    """Returns the module of the common tests, fetched if need be.

    Raises:
        RuntimeError: pip could not fetch the distribution, or it holds no such tests.
    """
    folder = _CACHE / transformers.__version__
    if not (folder / _PACKAGE).is_dir():
        _fetch(folder)
    sys.path.insert(0, str(folder))
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        raise RuntimeError(f"pip could not fetch the source of {wanted}: {done.stderr.strip()}")
    with tarfile.open(archives[0]) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and parts[-1].endswith(".py"):
                _write(folder / ".partial" / Path(*parts[2:]), archive.extractfile(member).read())
    for name, left_out in _LEFT_OUT.items():
        _write(folder / ".partial" / name, f"class {left_out}:\n    pass\n".encode())
    if not (folder / ".partial" / "test_modeling_common.py").is_file():
        raise RuntimeError(f"the source distribution of {wanted} holds no test_modeling_common.py")
    (folder / ".partial").rename(folder / _PACKAGE)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
