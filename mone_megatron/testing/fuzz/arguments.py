"""Draws arguments of tools that cannot be, and says what is wrong with an answer to them.

A tool is called as it is called right, but for one option or place, which gets a value that is no
number, no file or too large. It may do its work all the same (a prompt is any text); else it says
in one line that begins with ``error:`` what it cannot do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random

_NUMBERS = ("-1", "0", "1.5", "nan", "inf", "1e400", "many", "", "9" * 23)
_DEVICE = "device"


@dataclass(frozen=True)
class OddCall:
    """Holds a call of a tool with one argument that cannot be.

    Attributes:
        tool: the tool, as ``tools/NAME.py`` is called.
        arguments: all of them.
        option: the one that is odd.
        value: what it is given.
    """

    tool: str
    arguments: tuple[str, ...]
    option: str
    value: str


def _few(text: str, output: str) -> list[str]:
    return ["--max-tokens", "64", "--device", "cpu", "--output", output]


# Tool -> its arguments for a run, a text and a folder that is not there yet.
TOOLS: Mapping[str, Callable[[str, str, str], list[str]]] = {
    "analyze_run": lambda run, text, out: [run, "--text", text, *_few(text, out)],
    "compare_runs": lambda run, text, out: [run, "--output", out],
    "eval_hf": lambda run, text, out: [run, "--perplexity", text, "--max-tokens", "64"],
    "export_hf": lambda run, text, out: [run, "--output", out],
    "generate": lambda run, text, out: [run, "--prompt", "def", "--max-new-tokens", "2"],
    "import_hf": lambda run, text, out: [run, "--output", out],
    "plan": lambda run, text, out: ["experiment=tiny_mone"],
    "scaling_law": lambda run, text, out: [run, "--output", out],
    "sparsify_hf": lambda run, text, out: [run, "--perplexity", text, *_few(text, out)],
}


def odd_places(folder: Path) -> list[str]:
    """Makes files that no tool can read in an empty folder; returns them and what is not there."""
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "bytes").write_bytes(bytes(range(256)) * 20)
    (folder / "half.json").write_text("{", encoding="utf-8")
    (folder / "latin").write_bytes(b"caf\xe9 \xff\n" * 50)
    (folder / "other.jsonl").write_text('{"text": 3}\n[1]\n', encoding="utf-8")
    # By a link, so that a tool that puts a file in its place harms nobody.
    (folder / _DEVICE).symlink_to("/dev/null")
    there = [str(path) for path in sorted(folder.iterdir())]
    return [*there, str(folder / "nowhere"), str(folder / "nowhere" / "deep"), "/proc/x/y"]


def draw_call(random: Random, run: str, text: str, places: Sequence[str], output: str) -> OddCall:
    """Returns a call with one odd argument.

    Args:
        random: the source of what is drawn.
        run: a folder that tools read.
        text: a text file.
        places: those of :func:`odd_places`.
        output: a folder that is not there.
    """
    tool = random.choice(sorted(TOOLS))
    action = random.choice([one for one in _actions(tool) if one.nargs != 0])
    numeric = action.type is not None and action.type is not Path
    value = random.choice([*_NUMBERS, *places] if numeric else places)
    arguments = TOOLS[tool](run, text, output)
    if not action.option_strings:
        return OddCall(tool, (value, *arguments[1:]), action.dest, value)
    option = action.option_strings[-1]
    if option in arguments:
        arguments[arguments.index(option) + 1] = value
    else:
        arguments += [option, value]
    return OddCall(tool, tuple(arguments), option, value)


def _actions(tool: str) -> list[argparse.Action]:
    parser: argparse.ArgumentParser = import_module(f"mone_megatron.commands.{tool}")._parser()
    return [action for action in parser._actions if action.dest != "help"]


def problem(code: int | None, error_lines: list[str], traceback: str, odd: Path) -> str:
    """Returns what is wrong with an answer; "" for nothing.

    Args:
        code: the exit status.
        error_lines: the lines that begin with ``error:``.
        traceback: of an exception that came through; "" for none.
        odd: the folder of :func:`odd_places`.
    """
    if traceback:
        return f"a traceback: {traceback}"
    if not (odd / _DEVICE).is_char_device():
        return "a file took the place of a device"
    if code not in (0, 1, 2):
        return f"ended with {code}"
    if code == 2 and len(error_lines) != 1:
        return f"{len(error_lines)} lines of errors"
    return ""
