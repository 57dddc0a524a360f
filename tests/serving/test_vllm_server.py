"""tools/serve.py as users start it, with OpenAI's own client: `make test-vllm`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reference_answers import Answer
from transformers import AutoTokenizer
from vllm_environment import PYTHON, REPOSITORY, run, variables

from mone_megatron.testing.ports import free_ports

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM: run make test-vllm"),
]
# Tokens that are generated.
NEW = 32
CLOSE = 1e-4


@pytest.fixture(scope="module")
def url(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the run that `plain` was exported from, which it exports anew."""
    log = tmp_path_factory.mktemp("server") / "log"
    (port,) = free_ports(1)
    run_dir = exports["plain"].parents[1] / "runs" / "plain"
    command = [sys.executable, str(REPOSITORY / "tools" / "serve.py"), str(run_dir)]
    command += ["--vllm-python", str(PYTHON), "--port", str(port), "--name", "mone"]
    command += ["--dtype", "fp32", "--", "--enforce-eager"]
    # Prefixes are cached in whole blocks; the usual ones are longer than most prompts here.
    command += ["--enable-prefix-caching", "--block-size", "32"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=variables() | {"PYTHONPATH": str(REPOSITORY)},
            cwd=log.parent,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while not _is_up(address):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def answers(
    url: str, exports: dict[str, Path], prompts: list[list[int]], tmp_path_factory: Any
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("client")
    text = AutoTokenizer.from_pretrained(exports["plain"]).decode(prompts[1])
    asked = {"prompts": prompts, "text": text, "new": NEW}
    (folder / "asked.json").write_text(json.dumps(asked))
    files = [str(folder / name) for name in ("asked.json", "answers.json")]
    run("client_of_server.py", url, "mone", *files)
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize("way", ["batch", "again", "at once"])
def test_completions_are_those_of_transformers(
    way: str, answers: dict[str, Any], expected: dict[str, list[Answer]]
) -> None:
    for answer, given in zip(expected["plain"], answers[way], strict=True):
        for place, token in enumerate(answer.tokens):
            if token != given["tokens"][place]:
                assert answer.margins[place] < CLOSE
                break
            assert abs(answer.logprobs[place] - given["logprobs"][place]) < CLOSE


def test_a_stream_is_the_text_in_pieces(answers: dict[str, Any]) -> None:
    assert len(answers["chunks"]) > 2
    assert "".join(answers["chunks"]) == answers["whole"]


def test_a_stop_ends_the_text_before_it(answers: dict[str, Any]) -> None:
    assert answers["finish_reason"] == "stop"
    assert answers["stopped"] == answers["whole"].partition(answers["stop"])[0]


def test_evaluation_by_the_server_is_the_evaluation_in_process(
    url: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    evaluate = [sys.executable, str(REPOSITORY / "tools" / "eval_hf.py")]
    environment = variables() | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*evaluate, "--write-example-tasks", str(tmp_path)], check=True, env=environment)
    tasks = [str(path) for path in sorted(tmp_path.glob("*.yaml"))]
    found = []
    for name, where in {"here": [], "served": ["--server", url]}.items():
        written = tmp_path / f"{name}.json"
        command = [*evaluate, str(exports["plain"]), "--tasks", *tasks, "--limit", "24", *where]
        result = subprocess.run(
            [*command, "--json", str(written)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found.append(json.loads(written.read_text()))
    here, served = (written["models"][0]["scores"] for written in found)
    assert len(here) > 2
    for one, other in zip(here, served, strict=True):
        assert (one["task"], one["metric"]) == (other["task"], other["metric"])
        assert other["value"] == pytest.approx(one["value"], rel=1e-4)


def test_prefixes_came_from_the_cache(url: str, answers: dict[str, Any]) -> None:
    assert answers["again"]
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        lines = page.read().decode().splitlines()
    hits = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
    assert sum(float(line.rpartition(" ")[2]) for line in hits) > 0
