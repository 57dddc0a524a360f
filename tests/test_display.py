"""Output that nobody reads, that cannot be encoded or has nowhere to go ends nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

# Shows as tools and runs do, then leaves its result on disk and says what was lost.
_WORK = """
import json, sys
from pathlib import Path
from tqdm import tqdm
from mone_megatron.display import harmless, lost
@harmless
def main():
    for _ in tqdm(range(50), mininterval=0):
        print("Müller → \\udce9 " + "x" * 2000, flush=True)
        print("Übung", file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(lost()))
    return 0
sys.exit(main())
"""


def _run(tmp_path: Path, shell: str, **environment: str) -> tuple[int, str, dict[str, str]]:
    """The exit code, standard error and what was lost of ``_WORK``, started by ``shell``."""
    (tmp_path / "work.py").write_text(_WORK, encoding="utf-8")
    result = tmp_path / "result"
    command = f"{sys.executable} {tmp_path / 'work.py'} {result}"
    done = subprocess.run(
        ["bash", "-c", shell.replace("WORK", command)],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stderr.decode(errors="replace"), json.loads(result.read_text())


@pytest.mark.parametrize(
    ("shell", "lost"),
    [
        ("(WORK; echo $? >&2) | head -1 >/dev/null", {"standard output": "Broken pipe"}),
        ("WORK >/dev/full", {"standard output": "No space left on device"}),
        ("WORK >&-", {}),
        ("WORK >/dev/full 2>/dev/full", {"standard output", "standard error"}),
        ("WORK 2>&-", {}),
        ("WORK <&- >&- 2>&-", {}),
    ],
)
def test_readers_that_leave(tmp_path: Path, shell: str, lost: object) -> None:
    code, said, missed = _run(tmp_path, shell)
    assert code == 0
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert missed == lost if isinstance(lost, dict) else set(missed) == lost
    if "echo" in shell:
        assert said.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_what_cannot_be_encoded_is_spelt_out(tmp_path: Path, environment: dict[str, str]) -> None:
    code, said, missed = _run(tmp_path, "WORK 2>&1 >/dev/null", **environment)
    assert (code, missed) == (0, {})
    assert "Traceback" not in said
    code, _, _ = _run(tmp_path, "WORK >/dev/null", **environment)
    assert code == 0


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    main, side = pty.openpty()
    (tmp_path / "work.py").write_text(_WORK, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "work.py"), str(tmp_path / "result")]
    process = subprocess.Popen(command, stdout=side, stderr=side, stdin=side)
    os.close(side)
    os.read(main, 100)
    os.close(main)
    assert process.wait() == 0
    assert "Input/output error" in (tmp_path / "result").read_text()


def test_a_reader_that_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from mone_megatron.display import harmless_output, lost\n"
        "with harmless_output(patience=0.2):\n"
        "    for _ in range(1000): print('x' * 1000, file=sys.stderr)\n"
        "    print(lost(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "not read for 0.2 s" in process.stdout.readline()
    assert process.wait() == 0
    process.communicate()
