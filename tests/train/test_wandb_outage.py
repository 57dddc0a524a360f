"""A W&B server that refuses, fails or stalls, or does so later: training never notices."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mone_megatron.config.load import compose
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.train.hooks import WandbHook

STEPS = 3
# Seconds the client waits for its server. Far more than the steps take even on a loaded machine:
# the order of the lines then tells who waited for whom.
PATIENCE = 25
ANSWER = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def broken_server(kind: str) -> Iterator[str]:
    """The address of one that is not there, that answers 500, or that never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refuses":
            server.close()
            yield address
            return
        server.listen(64)
        held: list[socket.socket] = []

        def answer() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                held.append(connection)
                if kind == "answers 500":
                    connection.recv(65536)
                    connection.sendall(ANSWER)
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield address
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@pytest.mark.parametrize("kind", ["refuses", "answers 500", "stalls"])
def test_an_outage_neither_stops_nor_delays_training(tmp_path: Path, kind: str) -> None:
    with broken_server(kind) as address:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mone_megatron.pretrain",
                "experiment=tiny_mone",
                "device=cpu",
                f"train.steps={STEPS}",
                "logging.report=false",
                "logging.wandb.mode=online",
                f"logging.wandb.timeout_seconds={PATIENCE}",
                f"run.dir={tmp_path}",
            ],
            cwd=REPOSITORY,
            env=os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40},
            stderr=subprocess.PIPE,
            text=True,
        )
        error = process.communicate(timeout=110)[1]
    assert process.returncode == 0, error
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "completed"
    assert error.count("WARNING: W&B") == 1, error
    # A stalled server is given up long after the last step: no step waited for it.
    if kind == "stalls":
        assert error.index(f"step {STEPS}/{STEPS}") < error.index("WARNING: W&B")
    # What W&B would have got waits for `wandb sync`.
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class StubRun:
    """A W&B run whose client hangs or fails."""

    def __init__(self, stuck: threading.Event | None) -> None:
        self.stuck = stuck

    def log(self, values: dict[str, float], step: int) -> None:
        if self.stuck is None:
            raise RuntimeError("connection\nlost")
        self.stuck.wait()

    def finish(self, exit_code: int) -> None: ...


@pytest.mark.parametrize("hangs", [True, False])
def test_a_client_that_hangs_or_fails_mid_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    stuck = threading.Event()
    stub = SimpleNamespace(
        init=lambda **options: StubRun(stuck if hangs else None),
        Settings=lambda **options: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    config = compose(["experiment=tiny_mone", "logging.wandb.timeout_seconds=0.2"])
    stream = io.StringIO()
    hook = WandbHook(config, tmp_path, stream=stream)
    hook.on_start()
    started = time.monotonic()
    for step in range(1, 1001):
        hook.on_step({"step": step, "loss": 1.0})
    assert time.monotonic() - started < 0.5
    hook.on_end("completed")
    assert time.monotonic() - started < 2.0
    stuck.set()
    assert stream.getvalue().count("WARNING: W&B") == 1
    assert ("does not end" if hangs else "connection lost") in stream.getvalue()
