"""What the fault suite tried and what held, as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BEGIN = "<!-- written by `make faults` -->"
END = "<!-- end of what `make faults` writes -->"


@dataclass
class Tally:
    """One part of a row: how often a fault was tried and how often its promise held."""

    row: int
    what: str
    tried: int = 0
    held: int = 0
    # One line for each time it did not.
    fell_short: list[str] = field(default_factory=list)
    # A figure to show beside the counts.
    note: str = ""

    def check(self, held: bool, otherwise: str) -> None:
        """Count one try; ``otherwise`` says what happened when it did not hold."""
        self.tried += 1
        if held:
            self.held += 1
        else:
            self.fell_short.append(otherwise)


def merge(rows: Mapping[int, Sequence[Tally]]) -> list[Tally]:
    """One tally for each part of each row, in order: parts of the same text are added up."""
    merged: dict[tuple[int, str], Tally] = {}
    for row in sorted(rows):
        for part in sorted(rows[row], key=lambda one: one.what):
            whole = merged.setdefault((row, part.what), Tally(row, part.what))
            whole.tried += part.tried
            whole.held += part.held
            whole.fell_short += part.fell_short
            whole.note = "; ".join(filter(None, [whole.note, part.note]))
    return list(merged.values())


def render(tallies: Sequence[Tally]) -> list[str]:
    """A Markdown table."""
    lines = ["| row | fault | tried | held | |", "|---|---|---|---|---|"]
    for one in tallies:
        short = one.fell_short[:3]
        if len(one.fell_short) > len(short):
            short.append(f"and {len(one.fell_short) - len(short)} more")
        remark = "; ".join(filter(None, [one.note, *short])).replace("|", "/")
        remark = " ".join(remark.split())
        lines.append(f"| {one.row} | {one.what} | {one.tried} | {one.held} | {remark} |")
    return lines


def write_into(document: Path, lines: Sequence[str], *, update: bool = False) -> None:
    """Replace what stands between the two markers of a document.

    Args:
        document: Markdown.
        lines: from :func:`render`.
        update: keep the lines that stand there for other faults.

    Raises:
        ValueError: the document has no markers.
    """
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document}: the lines {BEGIN!r} and {END!r} are missing")
    before, rest = text.split(BEGIN, 1)
    old, after = rest.split(END, 1)
    if update:
        rows = {_fault(line): line for line in [*old.splitlines()[3:], *lines[2:]]}
        lines = [*lines[:2], *(rows[fault] for fault in sorted(rows))]
    document.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def _fault(line: str) -> tuple[int, str]:
    """Row number and fault of a line of the table."""
    _, row, what, *_ = line.split("|")
    return int(row), what
