"""Shows several studies' outcomes on one self-contained page, ``studies.html``."""

from __future__ import annotations

from collections.abc import Sequence

from mone_megatron.lab.studies.outcome import Outcome
from mone_megatron.lab.studies.outcome_files import figure, frontier, table_rows
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.page import Page, escape
from mone_megatron.report.plots import png_data_uri

PAGE_FILE = "studies.html"


def studies_page(outcomes: Sequence[Outcome]) -> str:
    """Returns the page: the answers first, then each study's table and picture."""
    page = Page("Studies")
    page.heading_one("Studies")
    page.note(
        "Variants are trained with the same seeds and compared seed by seed: the mean difference "
        "of the last validation losses with its 95% interval (Student's t). An answer is given "
        "only where the interval does not hold 0; other sizes may answer otherwise."
    )
    page.table(
        ["question", "answer", "trained"],
        [(outcome.question, _answer(outcome), outcome.size) for outcome in outcomes],
        wrap=True,
    )
    for outcome in outcomes:
        page.heading(outcome.question, f"{outcome.name}: {outcome.size}; {outcome.hardware}")
        header, rows = table_rows(outcome)
        page.table(header, rows)
        for variant in outcome.variants:
            if variant.doubts:
                page.note(f"{variant.name} is {NOT_IDENTIFIED}: {reasons(variant.doubts)}")
        described = f"Each seed's difference to {outcome.reference}, means and intervals"
        page.raw(
            f'<img alt="{escape(described)}" style="max-width:100%;height:auto" '
            f'src="{png_data_uri(figure(outcome))}">'
        )
        described = "Loss over what a token costs, with the variants that no other beats in both"
        page.raw(
            f'<img alt="{escape(described)}" style="max-width:100%;height:auto" '
            f'src="{png_data_uri(frontier(outcome))}">'
        )
    return page.render()


def _answer(outcome: Outcome) -> str:
    compared = [variant for variant in outcome.variants if variant.difference is not None]
    told = "; ".join(
        f"{variant.name}: {variant.verdict}{f' ({NOT_IDENTIFIED})' if variant.doubts else ''}"
        for variant in compared
    )
    return f"Loss against {outcome.reference}: {told}"
