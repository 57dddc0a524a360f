"""What the table does not determine is said, wherever the number is given."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scaling_tables import build_table

from mone_megatron.lab.scaling_law.bootstrap import Bounds
from mone_megatron.lab.scaling_law.figures import allocation_figure, fit_figure, isoflop_figure
from mone_megatron.lab.scaling_law.fit import fit_law
from mone_megatron.lab.scaling_law.fit_files import study_json, text_report, write_study
from mone_megatron.lab.scaling_law.fitted_study import run_study
from mone_megatron.lab.scaling_law.identification import (
    coefficient_doubts,
    interval_doubts,
    log_loss_jacobian,
    sample_doubts,
)
from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.results import Method, Options, Request, Study
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.identified import Doubt, few_samples, rests_on, wide_interval

SOUND = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def study_of(
    table: Table, *, methods: Sequence[Method] = ("parametric",), resamples: int = 0, **more: object
) -> Study:
    options = Options(
        methods=tuple(methods),
        starts=40,
        resamples=resamples,
        holdout_budgets=0,
        folds=0,
        budgets=(1e21,),
    )
    return run_study(table, replace(options, **more))  # type: ignore[arg-type]


def kinds(study: Study) -> dict[str, list[str]]:
    return {
        name: [doubt.kind for doubt in one.doubts]
        for name, one in study.estimates.items()
        if one.doubts
    }


def test_a_sound_table_is_told_nothing() -> None:
    study = study_of(
        build_table(SOUND, noise=1e-3),
        methods=("parametric", "isoflop"),
        resamples=20,
        requests=(Request(1e9, 1e11), Request(1e11, 1e13)),
    )
    assert kinds(study) == {}
    assert not any("not identified" in warning for warning in study.warnings)
    assert "not identified" not in text_report(study)


@pytest.mark.parametrize(
    ("law", "unknown"),
    [
        (replace(SOUND, E=1e-12, alpha=0.1, A=30.0), {"E": ["bound"]}),
        (replace(SOUND, A=1e-9), {"A", "alpha"}),
        (replace(SOUND, B=1e-9), {"B", "beta"}),
        # A constant: nobody can tell it from E.
        (
            replace(SOUND, E=1.0, A=0.7, alpha=1e-9),
            {"E": ["flat"], "A": ["flat"], "alpha": ["bound"]},
        ),
    ],
    ids=["E is 0", "no A", "no B", "a constant A"],
)
def test_bounds_and_flat_directions_are_named_and_reach_the_optimum(
    law: Law, unknown: dict[str, list[str]] | set[str]
) -> None:
    study = study_of(build_table(law))
    assert study.parametric is not None
    found = {
        name: kinds(study)[name] for name in study.parametric.coefficients if name in kinds(study)
    }
    if isinstance(unknown, dict):
        assert found == unknown
    else:
        # The fit may give the term no height, or no slope: then E is as unknown as it.
        assert unknown <= set(found) <= unknown | {"E"}
    if study.parametric.allocations:
        for one in study.parametric.allocations[0].estimates.values():
            assert one.doubts[0].reason.startswith(f"it rests on {', '.join(found)}, which ")
    assert any("not identified" in warning for warning in study.warnings)


def test_the_jacobian_is_that_of_the_law() -> None:
    table = build_table(replace(SOUND, gamma=0.3), ratios=(0.25, 0.5, 1.0))
    fit = fit_law(table, neuron_term=True, starts=20)
    jacobian_RP = log_loss_jacobian(fit, table)
    mean_params, mean_tokens = (np.log(x).mean() for x in (table.params_R, table.tokens_R))
    assert table.ratio_R is not None
    assert fit.law.gamma is not None
    mean_ratio = np.log(table.ratio_R).mean()
    law, step = fit.law, 1e-6
    g = law.gamma * law.alpha
    theta = {
        "e": np.log(law.E),
        "a": np.log(law.A) - law.alpha * mean_params - g * mean_ratio,
        "alpha": law.alpha,
        "b": np.log(law.B) - law.beta * mean_tokens,
        "beta": law.beta,
        "g": g,
    }

    def log_loss(at: dict[str, float]) -> np.ndarray:
        moved = Law(
            E=np.exp(at["e"]),
            A=np.exp(at["a"] + at["alpha"] * mean_params + at["g"] * mean_ratio),
            alpha=at["alpha"],
            B=np.exp(at["b"] + at["beta"] * mean_tokens),
            beta=at["beta"],
            gamma=at["g"] / at["alpha"],
        )
        return np.log(moved.loss(table.params_R, table.tokens_R, table.ratio_R))

    for column, name in enumerate(theta):
        up, down = (log_loss({**theta, name: theta[name] + sign * step}) for sign in (1, -1))
        np.testing.assert_allclose(jacobian_RP[:, column], (up - down) / (2 * step), atol=1e-8)


def test_too_few_sizes_points_and_keep_ratios() -> None:
    three = kinds(study_of(build_table(SOUND, sizes=(1e8, 3e8, 1e9))))
    assert (three["A"], three["alpha"]) == (["few"], ["few"])
    assert "E" not in three
    assert "B" not in three
    seven = build_table(SOUND).take(np.array([0, 1, 6, 7, 13, 18, 23]))
    assert set(kinds(study_of(seven))) >= {"E", "A", "alpha", "B", "beta"}
    ratios = build_table(replace(SOUND, gamma=0.3), ratios=(0.25, 1.0))
    two = study_of(ratios, neuron_term=True, keep_ratio=0.25)
    assert kinds(two)["gamma"] == ["few"]
    assert "gamma" in two.estimates["parametric N_opt of 1e+21 FLOPs"].doubts[0].reason
    # Of a model that keeps all neurons gamma says nothing.
    whole = study_of(ratios, neuron_term=True)
    assert whole.estimates["parametric N_opt of 1e+21 FLOPs"].identified


def test_scatter_leaves_directions_open() -> None:
    noisy = build_table(
        SOUND, sizes=(1e8, 2e8, 4e8, 8e8), budgets=(3e19, 1e20, 3e20), noise=5e-2, seed=1
    )
    found = coefficient_doubts(fit_law(noisy, starts=40), noisy)
    flat = {name for name, one in found.items() if any(doubt.kind == "flat" for doubt in one)}
    assert flat & {"alpha", "beta"}


def test_predictions_among_the_runs_need_no_coefficients() -> None:
    law = replace(SOUND, E=1e-12, alpha=0.1, A=30.0)
    study = study_of(build_table(law), requests=(Request(3e8, 1e10), Request(3e9, 1e12)))
    assert study.parametric is not None
    inside, beyond = study.parametric.predictions
    assert inside.loss.identified
    assert [doubt.kind for doubt in beyond.loss.doubts] == ["rests"]


def test_parabolas() -> None:
    # Sizes beyond the best of the larger budgets were not tried.
    table = build_table(SOUND, sizes=(1e7, 3e7, 1e8), budgets=(1e18, 1e19, 1e20))
    study = study_of(table, methods=("isoflop",), allow_outside=True)
    found = kinds(study)
    assert found["IsoFLOP minimum of 1e+18 FLOPs"] == ["few"]
    assert found["IsoFLOP minimum of 1e+20 FLOPs"] == ["few", "bound"]
    assert found["IsoFLOP a"] == ["rests"]
    two = build_table(SOUND, sizes=(3e7, 1e8, 3e8, 1e9, 3e9), budgets=(1e19, 1e20))
    assert kinds(study_of(two, methods=("isoflop",)))["isoflop N_opt of 1e+21 FLOPs"] == ["few"]
    wild = build_table(SOUND, sizes=(1e8, 2e8, 4e8, 8e8, 16e8), noise=6e-2, seed=2)
    shaky = kinds(study_of(wild, methods=("isoflop",), resamples=40))
    assert any("missing" in found for name, found in shaky.items() if "minimum" in name)
    assert {"missing", "wide"} & set(shaky["IsoFLOP a"])


@pytest.mark.parametrize(
    ("name", "interval", "kind"),
    [
        ("E", Bounds(1e-11, 2.0), "wide"),
        ("E", Bounds(1.6, 1.8), None),
        ("B", Bounds(1e3, 9e3), None),
        ("B", Bounds(1e3, 1e4), "wide"),
        ("alpha", Bounds(-0.1, 0.3), "zero"),
        ("beta", Bounds(0.2, 0.3), None),
        ("gamma", Bounds(-0.2, 0.4), None),
        ("gamma", Bounds(-0.2, 1.4), "wide"),
        ("a", Bounds(0.1, 0.7), "wide"),
        ("params", Bounds(1e9, 2e9), None),
        ("params", Bounds(1e9, float("inf")), "wide"),
        ("alpha", None, None),
    ],
)
def test_intervals(name: str, interval: Bounds | None, kind: str | None) -> None:
    assert [doubt.kind for doubt in interval_doubts(name, interval)] == ([kind] if kind else [])


def test_resamples_without_the_number_and_words() -> None:
    assert sample_doubts([1.0] * 97 + [np.nan] * 3, 0.95) == []
    (doubt,) = sample_doubts([1.0] * 90 + [np.nan] * 10, 0.95)
    assert doubt.kind == "missing"
    assert "10 of 100 resamples" in doubt.reason
    assert sample_doubts([], 0.95) == []
    assert few_samples(1, 3, "seed", "seeds") == [
        Doubt("few", "1 seed, at least 3 are needed to know its error")
    ]
    assert rests_on([]) == []
    assert "factor of 30" in wide_interval(1.0, 30.0)[0].reason


def test_files_text_and_pictures_say_it(tmp_path: Path) -> None:
    table = build_table(SOUND, sizes=(1e8, 3e8, 1e9), budgets=(1e19, 1e20, 1e21))
    study = study_of(table, methods=("parametric", "isoflop"), requests=(Request(1e11, 1e13),))
    text = text_report(study)
    rows = [line for line in text.splitlines() if line.startswith(("A ", "B "))]
    assert [line.endswith("not identified") for line in rows] == [True, False]
    assert "  alpha: 3 sizes, at least 4 are needed to know its error" in text
    content = json.loads(json.dumps(study_json(study), allow_nan=False))
    coefficients = content["parametric"]["coefficients"]
    assert [coefficients[name]["identified"] for name in ("A", "B")] == [False, True]
    assert coefficients["A"]["doubts"][0]["kind"] == "few"
    assert not content["allocations"][0]["params"]["identified"]
    assert not content["parametric"]["predictions"][0]["loss"]["identified"]
    write_study(study, tmp_path)
    for name, marked in (
        ("coefficients.csv", 4),  # A, alpha and the optimum's two exponents
        ("allocation.csv", 2),
        ("predictions.csv", 1),
        ("isoflop.csv", 3),
    ):
        with open(tmp_path / name, encoding="utf-8") as file:
            assert sum(bool(row["not_identified"]) for row in csv.DictReader(file)) == marked, name
    assert study.parametric is not None
    assert study.isoflop is not None
    for figure in (
        fit_figure(table, study.parametric),
        isoflop_figure(table, study.isoflop),
        allocation_figure(study),
    ):
        words = [item.get_text() for item in figure.findobj(lambda item: hasattr(item, "get_text"))]
        assert any("not identified" in word for word in words)
