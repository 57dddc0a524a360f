"""Warm processes are what ``python`` would start, but for what they have imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mone_megatron.testing.processes import run_in_processes
from mone_megatron.testing.warm_start import WarmProcess, run_python

# What a process can see of how it was started.
LOOK = """
import json, os, signal, sys, tempfile, multiprocessing.util
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "variable": os.environ.get("WARM"),
    "home": os.environ.get("HOME"), "main": __name__, "temporary": tempfile.gettempdir(),
    "sockets": os.path.dirname(multiprocessing.util.get_temp_dir()), "first": sys.path[0],
    "interrupt": str(signal.getsignal(signal.SIGINT)), "leads": os.getpid() == os.getsid(0),
    "starts": multiprocessing.get_start_method(),
    "alone": os.environ.get("ONLY_IN_TEST"),
    "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
}))
"""


def look(folder: Path, arguments: list[str], **variables: str) -> dict[str, object]:
    done = run_python(arguments, environment=variables, folder=folder)
    assert done.returncode == 0, done.stderr
    seen: dict[str, object] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize("form", ["code", "script", "module"])
def test_it_sees_what_a_process_of_the_system_sees(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "looking.py").write_text(LOOK, encoding="utf-8")
    forms = {"code": ["-c", LOOK], "script": ["looking.py"], "module": ["-m", "looking"]}
    arguments = [*forms[form], "one", "--two=3"]
    variables = {"WARM": "yes", "TMPDIR": str(tmp_path / "temporary")}
    # After the fork server may have been started.
    monkeypatch.setenv("ONLY_IN_TEST", "now")
    fresh = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    expected, seen = json.loads(fresh.stdout), look(tmp_path, arguments, **variables)
    # An absolute path, where python -c has "".
    assert Path(str(seen.pop("first"))) == (tmp_path / expected.pop("first")).resolve()
    if form == "module":
        assert Path(seen["arguments"][0]).name == "looking.py"  # type: ignore[index]
    assert seen == expected


def test_it_has_imported_what_takes_long_and_opened_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import torch.distributed as dist, threading; "
        "print('megatron.core' in before, 'mone_megatron.train.run' in before, "
        "dist.is_initialized(), threading.active_count())"
    )
    assert run_python(["-c", code], folder=Path.cwd()).stdout == "True True False 1\n"


def test_a_module_that_is_imported_already_runs_as_main(tmp_path: Path) -> None:
    done = run_python(["-m", "mone_megatron.pretrain", "--no-such-flag"], folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --no-such-flag: not taken")


def test_siblings_share_no_state(tmp_path: Path) -> None:
    code = "import torch; print(hasattr(torch, 'marked')); torch.marked = True"
    said = [run_python(["-c", code], folder=tmp_path).stdout for _ in range(2)]
    assert said == ["False\n", "False\n"]


def test_another_path_is_not_taken_for_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package on it, with methods of its own, would not be found."""
    with pytest.raises(AssertionError, match="PYTHONPATH"):
        run_python(["-c", ""], environment={"PYTHONPATH": str(tmp_path)}, folder=tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(AssertionError, match="PYTHONPATH"):
        run_in_processes(1, os.getpid)


@pytest.mark.parametrize(
    ("code", "returned"),
    [
        ("import sys; sys.exit(75)", 75),
        ("raise ValueError('of the code')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os; os._exit(3)", 3),
    ],
)
def test_its_end_is_told(code: str, returned: int, tmp_path: Path) -> None:
    done = run_python(["-c", code], folder=tmp_path)
    assert done.returncode == returned
    assert ("ValueError: of the code" in done.stderr) == ("ValueError" in code)


def test_one_that_hangs_is_ended_with_its_group(tmp_path: Path) -> None:
    process = WarmProcess(
        ["-c", "import subprocess, sys; subprocess.run(['sleep', '600'])"],
        environment=os.environ,
        folder=tmp_path,
        stderr=tmp_path / "said",
        new_session=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    assert process.poll() is None
    while os.getpgid(process.pid) != process.pid:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == process.returncode == -signal.SIGKILL
    process.kill()  # nobody is there
    assert process.said() == ""
