"""The table itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults_table import BEGIN, END, Tally, merge, render, write_into


def test_parts_of_a_row_are_added_up_and_failures_shown(tmp_path: Path) -> None:
    first, second = Tally(4, "bit flips"), Tally(4, "bit flips", note="3 files")
    first.check(True, "")
    second.check(False, "a|b\nloaded")
    lines = render(merge({4: [first, second], 2: [Tally(2, "kills", 3, 3)]}))
    assert lines[2:] == [
        "| 2 | kills | 3 | 3 |  |",
        "| 4 | bit flips | 2 | 1 | 3 files; a/b loaded |",
    ]
    document = tmp_path / "table.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(document, lines)
    write_into(document, lines)
    assert document.read_text() == "\n".join(["before", BEGIN, *lines, END, "after", ""])
    again = render([Tally(2, "kills", 4, 3), Tally(3, "trackers", 1, 1)])
    write_into(document, again, update=True)
    expected = [*again, lines[3]]
    assert document.read_text() == "\n".join(["before", BEGIN, *expected, END, "after", ""])


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "table.md"
    document.write_text("text")
    with pytest.raises(ValueError, match=r"table\.md"):
        write_into(document, [])
