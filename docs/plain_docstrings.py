"""A Sphinx extension: docstrings are plain text with `code`, whatever signs they hold.

Docstrings here are written to be read in the source: `|a|`, `a * u` and `gate_TF` stand in them as
they are, and formulas are indented. To reStructuredText some of these signs mean something else, so
that an innocent docstring would fail the build. Google's sections (Args, Returns) and roles such
as :class:`X` keep their meaning.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Double and single backquotes, and roles, whose text stays as it is.
_CODE = re.compile(r"(:[a-z:]+:`[^`]+`|``.+?``|`[^`]+`)")
_SIGNS = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")
_SECTION = re.compile(
    r"(Args|Arguments|Attributes|Returns|Raises|Yields|Note|Notes|Example|Examples):$"
)
_LIST = re.compile(r"([-*]|\d+\.|#\.) ")


def _escaped(line: str) -> str:
    parts = _CODE.split(line)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            # A backquote that opens here and closes on a later line would be markup.
            part = part.replace("`", r"\`")
            parts[number] = _SIGNS.sub(lambda match: "\\" + match[0], part)
        elif part.startswith("`") and not part.startswith("``"):
            parts[number] = f"`{part}`"
    return "".join(parts)


def plain(lines: list[str]) -> list[str]:
    """Returns the lines of a docstring as reStructuredText that shows them as they are.

    Args:
        lines: without the indentation that all of them share.
    """
    text: list[str] = []
    in_section = in_block = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        before_blank = number == 0 or not lines[number - 1].strip()
        if not line.strip():
            text.append("")
            continue
        if indent == 0:
            in_section = bool(_SECTION.match(line))
            in_block = False
        elif before_blank and not in_section and not in_block and not _LIST.match(line.lstrip()):
            # An indented paragraph is a formula or a picture in text.
            text += ["::", ""]
            in_block = True
        if in_block:
            text.append(line)
            continue
        # A list needs a blank line before it.
        if (
            _LIST.match(line.lstrip())
            and not before_blank
            and not _LIST.match(lines[number - 1].lstrip())
            and indent <= len(lines[number - 1]) - len(lines[number - 1].lstrip())
        ):
            text.append("")
        bullet = _LIST.match(line.lstrip())
        head = line[:indent] + (bullet[0] if bullet else "")
        text.append(head + _escaped(line[len(head) :]))
    return text


def _process(
    app: Sphinx, what: str, name: str, object_: object, options: object, lines: list[str]
) -> None:
    del app, what, name, object_, options
    lines[:] = plain(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects it, ahead of napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}
