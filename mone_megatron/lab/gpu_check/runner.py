"""Runs the checks one after the other within the time there is, and writes what each found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mone_megatron.helpers import ending
from mone_megatron.lab.gpu_check.checks import Check, missing

# A check that has less than this is not begun.
_LEAST_SECONDS = 15
_TAIL = 4000
_MOST_CHARACTERS = 600
PASSED, FAILED, LATE, LEFT = "passed", "failed", "out of time", "left out"


@dataclass
class Result:
    """Holds what one check found."""

    name: str
    asks: str
    # passed, failed, out of time, or left out.
    status: str
    # Why it was left out, or the last line of a failure.
    why: str = ""
    seconds: float = 0.0
    expected: str = ""
    found: Any = None
    # What the page shows of it.
    shown: Any = None
    output: str = field(default="", repr=False)


def run_check(check: Check, limit: float) -> Result:
    """Runs one check for at most ``limit`` seconds; its process and all that it started end."""
    began = time.perf_counter()
    if check.json_file is not None:
        # What an earlier run left there is not what this one finds.
        check.json_file.unlink(missing_ok=True)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    process = subprocess.Popen(
        check.command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = PASSED if process.returncode == 0 else FAILED
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = LATE
    result = Result(check.name, check.asks, status, expected=check.expected)
    result.seconds, result.output = round(time.perf_counter() - began, 1), output[-_TAIL:]
    result.found = _found(check, output)
    result.shown = check.shown(result.found) if isinstance(result.found, dict) else None
    if status == FAILED:
        lines = [line[-300:] for line in output.splitlines() if line.strip()][-1:]
        if process.returncode < 0 or not lines:
            lines.insert(0, ending(process.returncode))
        result.why = "; its last line: ".join(lines)
    elif status == LATE:
        result.why = f"stopped after {limit:.0f} seconds"
    return result


def _found(check: Check, output: str) -> Any:
    try:
        if check.json_file is not None:
            return json.loads(check.json_file.read_text(encoding="utf-8"))
        return json.loads(output.splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None


def run_all(
    checks: list[Check], output: Path, *, minutes: float, gpu: bool, say: Callable[[str], None]
) -> list[Result]:
    """Runs what can be run in ``minutes``; a failure stops nothing.

    Args:
        checks: in their order.
        output: an existing folder; gpu_check.json and gpu_check.md in it are written anew after
            each check.
        minutes: for all of them.
        gpu: whether there is one.
        say: is told of each check.
    """
    end = time.monotonic() + 60 * minutes
    results: list[Result] = []
    for check in checks:
        reasons = [why for need in check.needs if (why := missing(need, gpu=gpu))]
        remaining = end - time.monotonic()
        if reasons:
            result = Result(check.name, check.asks, LEFT, reasons[0], expected=check.expected)
        elif remaining < _LEAST_SECONDS:
            why = f"the {minutes:g} minutes are over"
            result = Result(check.name, check.asks, LEFT, why, expected=check.expected)
        else:
            result = run_check(check, min(check.seconds, remaining))
        results.append(result)
        say(f"{result.name}: {result.status}{f' ({result.why})' if result.why else ''}")
        _write(results, output, [check.name for check in checks[len(results) :]])
    return results


def _write(results: list[Result], output: Path, to_come: list[str]) -> None:
    facts = json.dumps([asdict(result) for result in results], indent=1) + "\n"
    texts = {"gpu_check.json": facts, "gpu_check.md": page(results, to_come)}
    for name, text in texts.items():
        # Whole at any time: whoever runs this may be stopped without a word.
        beside = output / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(output / name)


def page(results: list[Result], to_come: list[str]) -> str:
    """Returns the results for people, as Markdown: what was expected of an H100 beside it.

    Args:
        results: of the checks that are over.
        to_come: the names of the others.
    """
    by_status = {
        status: ", ".join(result.name for result in results if result.status == status)
        for status in (PASSED, FAILED, LATE, LEFT)
    } | {"not begun": ", ".join(to_come)}
    lines = ["# GPU check", ""]
    lines += [f"- {status}: {names}" for status, names in by_status.items() if names]
    lines += ["", "Expectations are models of an H100, not measurements.", ""]
    lines += ["| check | asks | result | seconds | expected | found |", "|---|---|---|---|---|---|"]
    for result in results:
        status = f"{result.status}: {result.why}" if result.why else result.status
        cells = (result.name, result.asks, status, f"{result.seconds:g}", result.expected,
                 _short(result.shown))  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _short(found: Any) -> str:
    if not isinstance(found, dict):
        return ""
    parts = []
    for key, value in found.items():
        if isinstance(value, dict):
            parts.append(_short(value))
        elif not isinstance(value, list):
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(part for part in parts if part)[:_MOST_CHARACTERS]
