"""Shows several studies' outcomes on one self-contained page, ``studies.html``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from mone_megatron.lab.studies.definition import EQUAL_WITHIN, folder_of
from mone_megatron.lab.studies.outcome import Outcome, Variant
from mone_megatron.lab.studies.outcome_files import (
    COSTS,
    alike_in,
    figure,
    frontier,
    paired_loss,
    table_rows,
    unbeaten,
)
from mone_megatron.lab.studies.words import OF_INTEREST, conclusions
from mone_megatron.report.formatting import ABSENT, format_loss, format_signed
from mone_megatron.report.identified import NOT_IDENTIFIED, reasons
from mone_megatron.report.page import Cell, Page, asset, escape
from mone_megatron.report.plots import png_data_uri
from mone_megatron.report.run_page import REPORT_FILE
from mone_megatron.report.stats import Interval

PAGE_FILE = "studies.html"

# What a reader has to know to read the figures, and what a reviewer would ask.
_LIMITS = (
    "A seed decides initial weights, order of data and validation split, so variants of one seed "
    "see the same tokens in the same order; differences are taken seed by seed.",
    "All variants train with the learning rate, schedule and number of tokens that the study's "
    "file says, unless a variant's name says otherwise: none has been tuned for the test.",
    "Coefficients and targets are those of the files under mone_megatron/lab/studies; a method "
    "that another value would suit better has not been given it.",
    "activated: parameters that a token uses, with router and whole gate, embeddings and "
    "attention. Where a method fixes no number it is what was measured over the last quarter of "
    f"the steps, and a study of equal budgets compares what is within {EQUAL_WITHIN:.0%} only.",
    "decode bytes: bf16 weights read for one token alone, counted, not timed.",
    "step FLOPs: operations that a training step computes, over the reference's. Masks are applied "
    "to dense products, so few neurons save nothing in training; what selecting costs beside the "
    "products is not counted, and shows in the time. A router of no fixed number of experts counts "
    "with its planned one.",
    "step time: seconds over the reference's, each of the least disturbed of its runs (their 10th "
    "percentile of steps). The machine was shared, so it tells factors, not percents.",
    "One size, one corpus, one schedule a study: other sizes may answer otherwise.",
)


def studies_page(outcomes: Sequence[Outcome]) -> str:
    """Returns the page: the answers first, then each study's ranking and pictures.

    The page leads to the runs' own reports, which lie below the folder that it is written into.
    """
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
    for index, outcome in enumerate(outcomes):
        _study(page, outcome, index)
    page.heading("How to read this")
    page.raw("<ul>" + "".join(f"<li>{escape(limit)}</li>" for limit in _LIMITS) + "</ul>")
    style, script = (asset(__package__, f"studies.{kind}") for kind in ("css", "js"))
    data = {"studies": [_drawn(outcome) for outcome in outcomes], "interest": OF_INTEREST}
    page.extend(data, style=style, script=script)
    return page.render()


def _study(page: Page, outcome: Outcome, index: int) -> None:
    page.raw(f'<section class="study" data-study="{index}">')
    page.heading(outcome.question, f"{outcome.name}: {outcome.size}; {outcome.hardware}")
    if outcome.missing:
        page.banner("warn", "Not all runs are trained yet; what follows is of those that are.")
    page.raw("<ul>" + "".join(f"<li>{escape(one)}</li>" for one in conclusions(outcome)) + "</ul>")
    header, rows = table_rows(outcome)
    page.table(
        ["variant", *header[1:5], "verdict", *header[6:]],
        [_cells(outcome, variant, row) for variant, row in zip(outcome.ranked, rows, strict=True)],
        sortable=True,
        identity=f"ranking{index}",
    )
    for variant in outcome.variants:
        if variant.doubts:
            page.note(f"{variant.name} is {NOT_IDENTIFIED}: {reasons(variant.doubts)}")
    # Filled by the page's script.
    page.raw('<div class="drawn"></div>')
    page.raw("<noscript>")
    for described, picture in (
        (f"Each seed's difference to {outcome.reference}, means and intervals", figure),
        ("Loss over what a token costs, with the variants that no other beats in both", frontier),
    ):
        page.raw(
            f'<img alt="{escape(described)}" class="static" src="{png_data_uri(picture(outcome))}">'
        )
    page.raw("</noscript>")
    page.raw("<details><summary>Every run, with its own report</summary>")
    seeds = sorted({seed for variant in outcome.variants for seed in variant.seeds})
    page.table(
        ["variant", *(f"seed {seed}" for seed in seeds)],
        [
            (variant.name, *(_run_cell(outcome, variant, seed) for seed in seeds))
            for variant in outcome.ranked
        ],
        sortable=True,
        identity=f"runs{index}",
    )
    page.raw("</details></section>")


def _cells(outcome: Outcome, variant: Variant, row: Sequence[str]) -> list[str | Cell]:
    """Returns a row of the ranking, sorted by numbers and not by how they are written."""
    mean = 0.0 if variant.is_reference else None
    if variant.compared is not None and math.isfinite(variant.compared.mean):
        mean = variant.compared.mean
    values = (
        None,
        float(variant.parameters),
        variant.budget.activated,
        variant.mean.mean if math.isfinite(variant.mean.mean) else None,
        mean,
        None,
        variant.budget.decode_bytes,
        outcome.flops_ratio(variant),
        outcome.step_ratio(variant),
        float(len(variant.seeds)),
    )
    return [Cell(text, value=value) for text, value in zip(row, values, strict=True)]


def _run_cell(outcome: Outcome, variant: Variant, seed: int) -> str | Cell:
    if seed not in variant.seeds:
        return ABSENT
    loss = format_loss(variant.losses[variant.seeds.index(seed)])
    where = "/".join((outcome.name, folder_of(variant.name), f"seed_{seed}", REPORT_FILE))
    difference = variant.differences.get(seed)
    told = f"{format_signed(difference)} to {outcome.reference}" if difference is not None else ""
    return Cell(loss, link=quote(where), title=told)


def _drawn(outcome: Outcome) -> dict[str, Any]:
    """Returns what the page's script draws of a study; the variants are in order of the ranking."""
    ranked = outcome.ranked
    losses = {variant.name: paired_loss(outcome, variant) for variant in ranked}
    return {
        "reference": outcome.reference,
        "costs": [
            {
                "title": title,
                "label": label,
                "alike": alike_in([cost_of(variant) for variant in ranked]),
                "unbeaten": [
                    place
                    for place in unbeaten([(cost_of(v), losses[v.name][0].mean) for v in ranked])
                    if all(map(math.isfinite, place))
                ],
            }
            for title, label, cost_of in COSTS
        ],
        "variants": [
            {
                "name": variant.name,
                "verdict": variant.verdict,
                "color": outcome.variants.index(variant),
                "isReference": variant.is_reference,
                "seeds": list(variant.seeds),
                "losses": list(variant.losses),
                "loss": _interval(variant.mean),
                "differences": [variant.differences.get(seed) for seed in variant.seeds],
                "difference": _interval(variant.compared),
                # Without what a seed does to all.
                "paired": _interval(losses[variant.name][0]),
                "pairedSeeds": losses[variant.name][1],
                "costs": [cost_of(variant) for _, _, cost_of in COSTS],
            }
            for variant in ranked
        ],
    }


def _interval(interval: Interval | None) -> dict[str, float | None] | None:
    """Returns mean and ends, NaN where they are unknown; None where there is no mean."""
    if interval is None or not math.isfinite(interval.mean):
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _answer(outcome: Outcome) -> str:
    compared = [variant for variant in outcome.variants if not variant.is_reference]
    told = "; ".join(
        f"{variant.name}: {variant.verdict}{f' ({NOT_IDENTIFIED})' if variant.doubts else ''}"
        for variant in compared
    )
    return f"Loss against {outcome.reference}: {told}"
