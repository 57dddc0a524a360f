"""The page of studies in a real browser: sorted, pointed at, and nothing of it cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from chromium_browser import Browser
from test_studies_words import outcome, variant

from mone_megatron.lab.studies.page import studies_page

NAMES = "[...document.querySelectorAll('#ranking{} tbody tr')].map((r) => r.cells[0].innerText)"
# Whether all that is drawn for variants lies within its picture.
INSIDE = """
[...document.querySelectorAll('.drawn svg')].every((svg) => {
  const all = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('[data-variant] > *')].every((node) => {
    const one = node.getBoundingClientRect();
    return one.left >= all.left - 1 && one.right <= all.right + 1 && one.top >= all.top - 1 &&
      one.bottom <= all.bottom + 1;
  });
})
"""


def test_the_page_of_studies_reacts(browser: Browser, tmp_path: Path) -> None:
    # Wide intervals, one seed, many more variants than colours, a name that is markup.
    first = outcome(
        variant("</script><b>bold", (-0.3, 0.4, -0.2)),
        variant("far", (1.1, 1.3, 3.0)),
        variant("off", (-0.1, -0.1, -0.2), off_budget=0.05),
        variant("single", (-0.05,)),
        *(variant(f"{k} of 16", (0.01 * k, 0.02 * k, 0.0)) for k in range(1, 9)),
    )
    dearer = [
        replace(one, realised_flops=one.realised_flops * (2 + k))
        for k, one in enumerate(first.variants)
    ]
    second = replace(first, name="y", question="A < B?", variants=tuple(dearer))
    page = tmp_path / "studies.html"
    page.write_text(studies_page([first, second]), encoding="utf-8")
    tab = browser.open(page)
    assert tab.problems() == []
    assert tab.evaluate("document.querySelectorAll('.drawn .card').length") == 2 * 4
    assert tab.evaluate(INSIDE)

    ranked = [one.name for one in first.ranked]
    assert tab.evaluate(NAMES.format(0)) == ranked
    # By name, numbers in it as numbers, and once more the other way round; the other table stays.
    tab.click("#ranking0 th:nth-child(1) button")
    by_name = tab.evaluate(NAMES.format(0))
    assert by_name[-4:] == ["far", "off", "r", "single"]
    assert by_name.index("2 of 16") == by_name.index("1 of 16") + 1
    tab.click("#ranking0 th:nth-child(1) button")
    assert tab.evaluate(NAMES.format(0)) == by_name[::-1]
    assert tab.evaluate(NAMES.format(1)) == ranked
    # By difference; what has none is at the end, both ways.
    tab.click("#ranking0 th:nth-child(5) button")
    tab.click("#ranking0 th:nth-child(5) button")
    by_difference = tab.evaluate(NAMES.format(0))
    assert (by_difference[0], by_difference[-1]) == ("far", "off")

    # Pointing at a row finds its variant everywhere, its seeds with it.
    place = ranked.index("far")
    cover = f"section[data-study='1'] .forest .cover:nth-of-type({2 + place})"
    where = json.dumps(cover)
    tab.evaluate(f"document.querySelector({where}).scrollIntoView({{ block: 'center' }})")
    tab.hover(cover)
    told = tab.text("section[data-study='1'] .forest .tip")
    assert told.startswith("far")
    assert "seed 2: 5.0000, +3.0000" in told
    marked = "document.querySelectorAll('{}').length"
    assert tab.evaluate(marked.format("section[data-study=\\'1\\'] .drawn g.on")) == 4
    assert tab.evaluate(marked.format("section[data-study=\\'0\\'] .drawn g.on")) == 0
    assert tab.text("#ranking1 tr.on td").startswith("far")
    tab.hover("h1")
    assert tab.evaluate(marked.format(".drawn g.on")) == 0
    tab.hover("#ranking0 tbody tr:nth-child(2)")
    assert tab.evaluate(marked.format("section[data-study=\\'0\\'] .drawn g.on")) >= 3
    assert tab.problems() == []
    tab.close()
