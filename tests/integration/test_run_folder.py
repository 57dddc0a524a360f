"""A run owns its folder, is ended by nothing that only shows, and refuses files it cannot use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mone_megatron.ownership import OWNER_FILE, owned_folder
from mone_megatron.pretrain import USAGE_EXIT_CODE, main
from mone_megatron.testing.launch import REPOSITORY

RUN = (
    "experiment=tiny_moe",
    "device=cpu",
    "device.threads=1",
    "logging.wandb.mode=disabled",
    "data.max_megabytes=0.2",
)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != OWNER_FILE
    }


def _refused(
    capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str, key: str = "run.dir"
) -> str:
    """The one line of a start that ends with 2; ``folder`` is as before."""
    before = _contents(folder)
    assert main([*RUN, f"run.dir={folder}", *overrides]) == USAGE_EXIT_CODE
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith(f"error: {key}")
    assert _contents(folder) == before
    return lines[0]


def test_a_second_run_is_refused_and_nothing_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(folder)
    with owned_folder("run.dir", folder):
        for where in (folder, tmp_path / "link"):
            told = _refused(capsys, where, "train.seed=7")
            assert f"in use by process {os.getpid()} on {os.uname().nodename}, since 20" in told
        # Another rank of another job is refused, too, and says nothing.
        for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setenv(f"LOCAL_{name}", value)
        assert main([*RUN, "train.global_batch_size=8", f"run.dir={folder}"]) == USAGE_EXIT_CODE
        assert capsys.readouterr().err == ""


def test_a_live_run_inside_what_would_be_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / "checkpoints" / "another"
    with owned_folder("run.dir", inside):
        assert str(inside) in _refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("make", "override", "key"),
    [
        ("file", "run.dir={place}", "run.dir: cannot use"),
        ("file", "run.dir={place}/deep/er", "run.dir: cannot use"),
        ("", "run.dir={place}" + "x" * 300, "run.dir: cannot use"),
        ("", "run.dir=/proc/nowhere", "run.dir: cannot use"),
        ("file", "data.cache_dir={place}", "data.cache_dir="),
        ("", "data.cache_dir=/proc/nowhere", "data.cache_dir="),
        ("", "data.cache_dir={place}" + "x" * 300, "data.cache_dir="),
        ("", "data.tokenizer={place}" + "x" * 300, "data.tokenizer="),
        ("", "checkpoint.resume={place}" + "x" * 300, "checkpoint.resume="),
        ("", "checkpoint.initialize={place}" + "x" * 300, "checkpoint.initialize="),
    ],
)
def test_places_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: str, override: str, key: str
) -> None:
    place = tmp_path / "place"
    if make:
        place.write_text("")
    _refused(capsys, tmp_path / "r", override.format(place=place), key=key)


@pytest.mark.parametrize(
    ("name", "is_folder"), [("metrics.jsonl", True), ("run.json", True), ("checkpoints", False)]
)
def test_a_folder_where_a_file_belongs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, is_folder: bool
) -> None:
    if is_folder:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    assert str(tmp_path / name) in _refused(capsys, tmp_path)


def test_what_only_shows_ends_no_run(tmp_path: Path) -> None:
    """All at once: no reader, a closed terminal's signal, a name that is not ASCII, no profile."""
    folder = tmp_path / "Läufe"
    folder.mkdir()
    # Where the folder of the profile would be.
    (folder / "profile").write_text("")
    command = [sys.executable, "-m", "mone_megatron.pretrain", *RUN, f"run.dir='{folder}'"]
    command += [
        "run.name='Müller'",
        "train.steps=8",
        "train.profile=1",
        "logging.progress=lines",
        "logging.interval=1",
    ]
    command += ["checkpoint.interval=8", "data.num_workers=1", f"data.cache_dir={tmp_path / 'c'}"]
    read, write = os.pipe()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        stdout=write,
        stderr=write,
    )
    os.close(write)
    said = b""
    while b"step 1/8" not in said:
        part = os.read(read, 65536)
        assert part, said.decode()
        said += part
    os.close(read)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert b"Traceback" not in said
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["steps"], facts["name"]) == ("completed", 8, "Müller")
    missed = {one["what"]: one["why"] for one in facts["not_shown"]}
    assert missed.keys() == {"standard error", "the profile"}
    assert missed["standard error"] == "Broken pipe"
    assert missed["the profile"].startswith("FileExistsError: ")
    assert "Müller" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "checkpoints" / "step_00000008").is_dir()


def test_all_ranks_of_a_refused_start_end_soon(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "mone_megatron.pretrain", *RUN]
    with owned_folder("run.dir", tmp_path):
        begun = time.monotonic()
        done = subprocess.run(
            [*command, f"run.dir={tmp_path}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
    assert done.returncode != 0
    assert done.stderr.count("error: run.dir: ") == 1
    # Far below the minutes that a rank waits for another.
    assert time.monotonic() - begun < 300
