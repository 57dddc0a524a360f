"""Makes a Python environment like this one, in which a folder's packages come before all others.

``make test`` has one for the later megatron-core. Whatever a test hands to a process as its
environment variables, and whichever way it starts it, an interpreter or script of the side
environment finds those packages: ``PYTHONPATH`` alone would be lost with a variable, and the
process would run on the installed release without a word.

usage: python -m mone_megatron.testing.side_environment ENVIRONMENT PACKAGES
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path


def make_side_environment(environment: Path, packages: Path) -> Path:
    """Makes the environment anew; nothing is installed into it.

    Args:
        environment: its folder; what is there goes.
        packages: the folder whose packages are found first.

    Returns:
        Its interpreter.

    Raises:
        ValueError: when ``packages`` is no folder, or ``environment`` is this one or holds
            something else.
    """
    environment, packages = environment.absolute(), packages.absolute()
    if not packages.is_dir():
        raise ValueError(f"{packages}: not a folder; name the one that holds the packages")
    if environment == Path(sys.prefix).absolute():
        raise ValueError(f"{environment}: it is this environment; name another folder")
    if environment.exists() and not (environment / "pyvenv.cfg").is_file():
        raise ValueError(f"{environment}: it is there and no environment; name another folder")
    venv.EnvBuilder(clear=True, symlinks=True).create(environment)
    places = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", "posix_prefix", places))
    lines = [str(packages)]
    for kind in ("purelib", "platlib"):
        # With what lies in its *.pth files: packages installed as they are edited.
        line = f"import site; site.addsitedir({sysconfig.get_path(kind)!r})"
        if line not in lines:
            lines.append(line)
    (site_packages / "side_environment.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _copy_scripts(Path(sysconfig.get_path("scripts")), environment / "bin")
    return environment / "bin" / "python"


def _copy_scripts(ours: Path, theirs: Path) -> None:
    """Copies scripts so that the other environment's interpreter runs them; links programs."""
    before, after = (bytes(folder) + b"/python" for folder in (ours, theirs))
    for script in ours.iterdir():
        copy = theirs / script.name
        if copy.exists() or not script.is_file():
            continue
        content = script.read_bytes()
        if content.startswith(b"#!"):
            copy.write_bytes(content.replace(before, after))
            copy.chmod(script.stat().st_mode)
        else:
            copy.symlink_to(script)


def main(arguments: list[str]) -> int:
    """Makes the environment of the command line; returns the exit status."""
    if len(arguments) != 2:
        sys.stderr.write("error: two folders are needed, ENVIRONMENT and PACKAGES\n")
        return 2
    try:
        make_side_environment(*map(Path, arguments))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
