"""Keeps one version of the code in a folder of its own, and runs its commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.testing.ports import free_ports

# Set by launchers of this process, and of no concern to the processes that are compared.
_LEFT_OUT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEFT_OUT_PREFIXES = ("TORCHELASTIC_", "WANDB_", "MONE_", "TRITON_", "PYTEST_")
_TIMEOUT_SECONDS = 3600.0
_TAIL_CHARACTERS = 2000


class CommandFailedError(RuntimeError):
    """Says that a command of a version failed, which one, and how its output ends."""


@dataclass(frozen=True)
class Revision:
    """Describes what is compared: a commit, or the working tree as it is.

    Attributes:
        commit: the hash; of the working tree, of the commit that it is a change of.
        subject: the first line of the commit's message.
        working_tree: whether uncommitted changes are part of it.
    """

    commit: str
    subject: str
    working_tree: bool = False

    def describe(self) -> str:
        """Returns a line for people."""
        where = "working tree on " if self.working_tree else ""
        return f"{where}{self.commit[:12]} ({self.subject})"


def find_revision(repository: Path, name: str | None) -> Revision:
    """Returns the commit of that name, or the working tree for None.

    Raises:
        ValueError: there is no such commit, or ``repository`` is no git repository.
    """
    wanted = "HEAD" if name is None else name
    command = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{wanted}^{{commit}}"]
    try:
        commit = _git(repository, *command).strip()
    except ValueError:
        raise ValueError(
            f"{wanted}: git knows no such commit in {repository}; give a hash, branch or tag"
        ) from None
    subject = _git(repository, "log", "-1", "--format=%s", commit).strip()
    return Revision(commit, subject, working_tree=name is None)


@contextmanager
def sources(repository: Path, revision: Revision, folder: Path) -> Iterator[Path]:
    """Yields a git worktree of the revision in ``folder``, removed at the end.

    For the working tree it holds every file that git tracks or would track, as it is now: later
    changes do not reach a comparison that has begun.
    """
    _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), revision.commit)
    try:
        if revision.working_tree:
            _copy_changes(repository, folder)
        yield folder
    finally:
        _git(repository, "worktree", "remove", "--force", str(folder))


def _copy_changes(repository: Path, folder: Path) -> None:
    root = Path(_git(repository, "rev-parse", "--show-toplevel").strip())
    for name in _names(folder, "--cached"):
        (folder / name).unlink()
    for name in _names(root, "--cached", "--others", "--exclude-standard"):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)


def _names(tree: Path, *which: str) -> list[str]:
    return [name for name in _git(tree, "ls-files", "-z", *which).split("\0") if name]


def _git(repository: Path, *arguments: str) -> str:
    # Hooks run git with these set, and they would win over -C.
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        check=False,
        capture_output=True,
        env=environment,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"git {arguments[0]} in {repository}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Version:
    """Describes one version of the code.

    Attributes:
        tree: its sources.
        work: where its commands run and write; paths in what they write are relative to it, so
            that they are the same for both versions.
    """

    tree: Path
    work: Path

    def tool(self, name: str, *arguments: str) -> list[str]:
        """Returns the command line of ``tools/NAME.py`` of this version."""
        return [sys.executable, str(self.tree / "tools" / f"{name}.py"), *arguments]

    def check(self) -> None:
        """Checks that its processes import this version and no other.

        Raises:
            ValueError: they do not, or cannot.
        """
        script = "import mone_megatron; print(mone_megatron.__file__)"
        try:
            imported = self.run([sys.executable, "-c", script], log="check").strip()
        except CommandFailedError as error:
            raise ValueError(str(error)) from None
        if self.tree.resolve() not in Path(imported).resolve().parents:
            raise ValueError(f"{imported} is imported, not {self.tree}; is PYTHONPATH ignored?")

    def run(self, command: Sequence[str], *, log: str, ranks: int = 0) -> str:
        """Runs a command in the work folder to its end.

        Args:
            command: with its arguments.
            log: what the files of its output in ``logs`` are named after.
            ranks: so many processes with torchrun's variables; 0 for one without.

        Returns:
            What the first process wrote to standard output.

        Raises:
            CommandFailedError: a process failed, or did not end in time.
        """
        port = str(free_ports(1)[0])
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in range(ranks)
        ] or [{}]
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        outputs = [logs / f"{log}-{rank}.out" for rank in range(len(environments))]
        errors = [path.with_suffix(".err") for path in outputs]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for environment, output, error in zip(environments, outputs, errors, strict=True):
                with output.open("wb") as out, error.open("wb") as err:
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=self.work,
                            env=self._environment() | environment,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            # So that all that it starts can be ended with it.
                            start_new_session=True,
                        )
                    )
            codes = _wait(processes)
        finally:
            for process in processes:
                _end(process)
        # The first that failed by itself; the others were ended for it, or wait for it in vain.
        for code, error in sorted(zip(codes, errors, strict=True), key=lambda pair: not pair[0]):
            if code is None or code:
                why = "did not end in time" if code is None else f"ended with {code}"
                tail = error.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
                raise CommandFailedError(f"{log} {why}:\n{tail.strip()}")
        return outputs[0].read_text(encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)
        }
        return kept | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
            # The code of exports is copied there; nothing is downloaded.
            "HF_HOME": str(self.work / "huggingface"),
            "HF_HUB_OFFLINE": "1",
        }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Returns exit codes; None for those still running when one failed or time ran out."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started, if anything of it is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
