"""Row 21: keys in the environment get nowhere; keys in a configuration are refused, unshown."""

from __future__ import annotations

import gzip
import os
import secrets
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fake_wandb import fake_wandb
from faults_helpers import SMALL
from faults_runs import Main, attempt, mains
from faults_table import Tally

from mone_megatron.testing.launch import REPOSITORY

Count = Callable[[int, str], AbstractContextManager[Tally]]
NOWHERE = "keys in the environment: in no argument, output or file of a run, nor sent to W&B"
UNSHOWN = "keys in a configuration: refused, the value not shown"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")


def command_lines() -> Iterator[bytes]:
    """Of all processes of the machine that we may look at."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:  # it has ended
            continue


def contents(path: Path) -> Iterator[bytes]:
    """Of a file, and what it is when unpacked."""
    content = path.read_bytes()
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    else:
        try:
            yield zlib.decompress(content)
        except zlib.error:
            return


@pytest.mark.parametrize("mode", ["offline", "online", "online, stalled"])
def test_keys_in_the_environment(tmp_path: Path, tally: Count, full: bool, mode: str) -> None:
    if not full and mode != "online":
        pytest.skip("with --faults-full")
    values = {name: secrets.token_hex(20) for name in NAMES}
    run = tmp_path / "run"
    seen: dict[str, bytes] = {}
    with fake_wandb() as fake:
        if "stalled" in mode:
            fake.break_down("stalls")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mone_megatron.pretrain",
                *SMALL,
                "train.steps=20",
                "checkpoint.interval=10",
                "checkpoint.async_save=true",
                "data.num_workers=1",
                "logging.report=true",
                "logging.progress=lines",
                f"logging.wandb.mode={mode.split(',')[0]}",
                "logging.wandb.timeout_seconds=30",
                f"run.dir={run}",
            ],
            cwd=REPOSITORY,
            env=os.environ | values | {"WANDB_BASE_URL": fake.url, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        looked = 0
        while process.poll() is None:
            for line in command_lines():
                looked += 1
                for name, value in values.items():
                    if value.encode() in line:
                        seen[f"arguments: {name}"] = line
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        assert process.stdout is not None
        output = process.stdout.read()
        received = bytes(fake.received)
    assert process.returncode == 0, output.decode()[-3000:]
    assert looked
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    kinds = {path.suffix for path in files}
    assert {".yaml", ".json", ".jsonl", ".html", ".png", ".wandb", ".distcp"} <= kinds, kinds
    with tally(21, NOWHERE) as t:
        for name, value in values.items():
            for form in (value, value[:20], value[20:]):
                with attempt(t, f"{name}, {mode}"):
                    assert f"arguments: {name}" not in seen, seen
                    assert form.encode() not in output, output.decode()
                    assert form.encode() not in received, "it was sent in a request's body"
                    holding = [
                        str(path)
                        for path in files
                        if any(form.encode() in content for content in contents(path))
                    ]
                    assert not holding, holding
        t.note = f"{len(files)} files, {looked} command lines"


OVERRIDES = [
    "+wandb.api_key={key}",
    "+logging.wandb.api_key={key}",
    "logging.wandb.api-key={key}",
    "+logging.wandb.apikey={key}",
    "+run.token={key}",
    "+data.hf_token={key}",
    "+hf_token={key}",
    "+data.aws_secret_access_key={key}",
    "+run.aws_access_key_id={key}",
    "+model.password={key}",
    "+train.credentials={key}",
    "+logging.wandb={{api_key:{key}}}",
    "run={{secret:{key}}}",
    "+hydra.job.env_set.WANDB_API_KEY={key}",
    # What a configuration could read from the environment would be saved with it.
    "run.name=${{oc.env:WANDB_API_KEY}}",
    "logging.wandb.group=${{oc.env:HF_TOKEN,none}}",
    "run.name=run-${{oc.env:AWS_SECRET_ACCESS_KEY}}",
]


def test_keys_in_a_configuration(tmp_path: Path, tally: Count) -> None:
    key = secrets.token_hex(20)
    environment = dict.fromkeys(NAMES, key)
    jobs = {
        override: Main((*SMALL, override.format(key=key)), environment) for override in OVERRIDES
    }
    ended = mains(jobs, tmp_path / "mains", watch=False)
    with tally(21, UNSHOWN) as t:
        for override, one in ended.items():
            with attempt(t, override):
                name = override.lstrip("+").split("=")[0]
                one.assert_refused(f"error: {name}")
                assert key not in one.said, one.said
