"""How Sphinx builds the documentation: `make docs` writes it into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
# The repository's own package, and the extension beside this file.
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from mone_megatron import __version__  # noqa: E402

project = "mone_megatron"
release = __version__
author = "the mone_megatron developers"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
    "plain_docstrings",
]
exclude_patterns = ["_static"]
# Commands, tables of numbers and messages: what is a language is said at the block.
highlight_language = "text"

# Links to headings, page.md#heading, as GitHub makes them; one that leads nowhere is a warning.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
# ```mermaid is a drawing on GitHub, too.
myst_fence_as_directive = ["mermaid"]
# A type that two modules export has two pages to link to; either will do.
suppress_warnings = ["ref.python"]
# Drawings have the size of their text, and lines of it break where they say so.
mermaid_height = "auto"
mermaid_width = "auto"
mermaid_init_config = {"startOnLoad": False, "flowchart": {"wrappingWidth": 600}}
mermaid_fullscreen = False
mermaid_light_theme = "neutral"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# A parameter is listed where it is explained; a class is explained by its constructor, too.
autodoc_typehints_description_target = "documented"
autoclass_content = "both"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_use_ivar = True
napoleon_numpy_docstring = False
# Docstrings write `name` for code.
default_role = "code"

html_theme = "furo"
html_title = "mone_megatron"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False


def leave_out_unwritten(app: Sphinx, page: str, source: list[str]) -> None:
    """Drops lines of the index that end with `?` where there is no such page yet."""
    if page != "index":
        return
    lines = []
    for line in source[0].splitlines():
        if line.endswith("?"):
            line = line.removesuffix("?")
            if line not in app.env.found_docs:
                continue
        lines.append(line)
    source[0] = "\n".join(lines)


def read_the_index_again(app: Sphinx, *changes: object) -> list[str]:
    """Has an unchanged index read again, because a page that it names may be new."""
    del app, changes
    return ["index"]


def setup(app: Sphinx) -> None:
    """Connects what is above."""
    app.connect("source-read", leave_out_unwritten)
    app.connect("env-get-outdated", read_the_index_again)
