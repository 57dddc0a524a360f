"""Studies: read and checked, really trained, gone on with, linked, and summed up."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from mone_megatron.commands.plan import main as plan_main
from mone_megatron.commands.study import main as study_main
from mone_megatron.config.schema import Config
from mone_megatron.lab.studies.definition import load_study, shipped_studies
from mone_megatron.lab.studies.outcome import Outcome, Variant, read_outcome
from mone_megatron.lab.studies.outcome_files import figure, frontier, markdown
from mone_megatron.lab.studies.outcome_files import write as write_outcome
from mone_megatron.lab.studies.page import studies_page
from mone_megatron.ownership import owned_folder
from mone_megatron.planning.budget import Budget
from mone_megatron.planning.match import value_of
from mone_megatron.report.compare import flatten
from mone_megatron.report.stats import mean_interval
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python

TINY = {
    "question": "Does it learn?",
    "experiment": "tiny_mone",
    "reference": "MoE",
    "overrides": [
        "train.steps=4", "train.eval_interval=2", "train.eval_steps=1", "optim.warmup_steps=0",
        "logging=quiet", "device.threads=1",
    ],
    "variants": {"MoE": ["mone.enabled=false"], "MoNE 1/4": []},
}  # fmt: skip
RELU_ROUTER = [
    "model.router.kind=relu", "model.router.balance=[none]", "model.router.balance_coeff=[0.0]",
]  # fmt: skip
UNRECORDED = r"{}: logging\.layer_interval: 0 does not record"


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(TINY | changes), encoding="utf-8")
    return path


def flat(config: Config) -> dict[str, object]:
    """The keys of a configuration, with dots in them, and their values."""
    return dict(flatten(asdict(config)))


def study(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(
        ["tools/study.py", *map(str, arguments)],
        environment={"OMP_NUM_THREADS": "1"},
        folder=REPOSITORY,
        timeout=600,
    )


@pytest.mark.parametrize("name", [path.stem for path in shipped_studies()])
def test_every_study_is_valid(name: str) -> None:
    claim = load_study(name)
    assert set(claim.configs) == set(claim.variants)
    # Nothing but what a variant names differs.
    reference = flat(claim.configs[claim.reference])
    for variant, config in claim.configs.items():
        for key, value in flat(config).items():
            if key.split(".")[0] in ("train", "data", "optim") and value != reference[key]:
                named = (*claim.variants[variant], *claim.variants[claim.reference])
                assert any(one.startswith(f"{key}=") for one in named), f"{variant}: {key}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "other"}, "reference: 'other' is not among the variants"),
        ({"variants": {"MoE": []}}, "variants: a mapping of at least two"),
        ({"seeds": [1]}, "seeds: unknown; use equal, experiment"),
        ({"experiment": ""}, "experiment: is missing"),
        ({"equal": "speed"}, "equal: 'speed' is not one of"),
        ({"overrides": ["train.seed=3"]}, "overrides: train.seed=3: the study sets it itself"),
        ({"overrides": "train.steps=3"}, "overrides: is not a list of key=value"),
        ({"variants": {"MoE": [], "a/b": [], "a b": []}}, "would share a folder"),
    ],
)
def test_what_is_not_a_study_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=r"x\.yaml: ") as refused:
        load_study(write(tmp_path / "x.yaml", **changes))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"equal": "activated"}, "MoNE 1/4: .* is not the .* of MoE; tools/plan.py --match"),
        ({"variants": {"MoE": [], "bad": ["mone.keep_ratio=7"]}}, r"bad: .*mone\.keep_ratio"),
        ({"overrides": ["train.eval_interval=0"]}, "eval_interval: 0 gives no validation loss"),
        ({"variants": {"MoE": [], "mass": ["mone.rule=mass"]}}, UNRECORDED.format("mass")),
        ({"variants": {"MoE": [], "ReLU": RELU_ROUTER}}, UNRECORDED.format("ReLU")),
    ],
)
def test_variants_are_checked_before_any_is_trained(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _ = load_study(write(tmp_path / "x.yaml", **changes)).configs


def test_some_variants_of_a_study() -> None:
    study = load_study("neurons")
    assert list(study.only(["mass", "1 of 4"]).variants) == ["top-k", "1 of 4", "mass"]
    with pytest.raises(ValueError, match="'pool' is none of neurons's: top-k; "):
        study.only(["pool"])
    with pytest.raises(ValueError, match="top-k is what neurons compares with; name another"):
        study.only(["top-k"])


def test_a_study_is_trained_gone_on_with_linked_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "small.yaml"), tmp_path / "out"
    before = study(file, "--seeds", 1, 2, "--output", output, "--report")
    assert before.returncode == 2
    assert "seed_1: not trained to its end (4 of 4 are missing)" in before.stderr

    done = study(file, "--seeds", 1, "--output", output, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    first = output / "small" / "MoE" / "seed_1" / "metrics.jsonl"
    written = first.stat().st_mtime_ns

    # What is there is reported, also while more is being trained.
    asked = [str(file), "--seeds", "1", "2", "--output", str(output), "--report"]
    with owned_folder("--output", output / "small"):
        assert study_main(asked) == 0
    told = capsys.readouterr().out
    assert "(`small`, 1 seed, " in told
    assert "Not trained yet: MoE (seed 2), MoNE 1/4 (seed 2)." in told

    # One more seed; what is there stays.
    done = study(file, "--seeds", 1, 2, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 runs to train" in done.stderr
    assert first.stat().st_mtime_ns == written
    result = json.loads((output / "small" / "study.json").read_text(encoding="utf-8"))
    variants = {variant["name"]: variant for variant in result["variants"]}
    for name, folder in (("MoE", "MoE"), ("MoNE 1/4", "MoNE_1_4")):
        for seed, loss in zip((1, 2), variants[name]["losses"], strict=True):
            metrics = output / "small" / folder / f"seed_{seed}" / "metrics.jsonl"
            last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
            assert last["val_loss"] == loss
    differences = [
        a - b for a, b in zip(*(variants[n]["losses"] for n in ("MoNE 1/4", "MoE")), strict=True)
    ]
    assert variants["MoNE 1/4"]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert (output / "small" / "study.png").stat().st_size > 1000
    page = (output / "studies.html").read_text(encoding="utf-8")
    assert f"wrote {output / 'studies.html'}" in done.stderr
    assert page.count("data:image/png;base64,") == 2
    assert "| MoNE 1/4 |" in done.stdout
    # It leads to a report of every run.
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 4
    assert all((output / link).is_file() for link in links)

    # A seed that the reference lacks is in the mean of the others, and in no difference.
    summary = output / "small" / "MoE" / "seed_2" / "run.json"
    kept = summary.read_text(encoding="utf-8")
    summary.write_text(kept.replace('"completed"', '"running"'), encoding="utf-8")
    part = read_outcome(load_study(file), output / "small", (1, 2))
    mone = next(one for one in part.variants if one.name == "MoNE 1/4")
    assert (mone.seeds, list(mone.differences)) == ((1, 2), [1])
    assert part.missing == (("MoE", 2),)
    assert part.size == f"1 to 2 seeds, {part.tokens:,} tokens each"
    summary.write_text(kept, encoding="utf-8")

    # Another study with the same runs trains none of them.
    other = write(tmp_path / "other.yaml", reference="MoNE 1/4")
    linked = study(other, "--seeds", 1, 2, "--output", output)
    assert linked.returncode == 0, linked.stderr
    assert "4 runs of other studies are the same, and linked" in linked.stderr
    assert "all 4 runs are there" in linked.stderr

    # Runs of other settings are not taken for its own.
    refused = study(file, "--seeds", 1, "--output", output, "--set", "optim.lr=0.5")
    assert refused.returncode == 2
    assert "was made with optim.lr=0.001, not 0.5; remove it" in refused.stderr


def test_an_output_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = study("half_activated", "--output", tmp_path / "file" / "out")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --output: {tmp_path / 'file' / 'out'}: Not a dir")


def test_a_failing_run_ends_the_study_with_its_own_words(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml")
    # The folder of a variant is a file: the run cannot begin.
    folder = tmp_path / "out" / "x"
    folder.mkdir(parents=True)
    (folder / "MoE").write_text("in the way", encoding="utf-8")
    done = study(file, "--seeds", 1, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "x: MoE: ended with code" in done.stderr
    assert "Traceback" not in done.stderr.split("ends:")[0]


def variant(name: str, losses: tuple[float, ...], difference: tuple[float, ...] | None) -> Variant:
    return Variant(
        name=name,
        seeds=tuple(range(len(losses))),
        losses=losses,
        mean=mean_interval(losses),
        difference=mean_interval(difference) if difference else None,
        differences=dict(enumerate(difference or ())),
        is_reference=difference is None,
        parameters=1000,
        budget=Budget(activated=500.0, decode_bytes=900.0, step_flops=3e6),
        realised_flops=4e6,
    )


def test_verdicts_follow_from_intervals() -> None:
    # Mean -0.2, deviation 0.1, three seeds: half-width 4.3027 * 0.1 / sqrt(3) = 0.248.
    unclear = variant("a", (1.0, 1.0, 1.0), (-0.1, -0.2, -0.3))
    assert unclear.difference is not None
    assert unclear.difference.half_width == pytest.approx(0.2484, abs=1e-4)
    assert unclear.verdict == "no difference seen"
    assert variant("b", (1.0, 1.0), (-0.2, -0.2)).verdict == "lower"
    assert variant("c", (1.0, 1.0), (0.2, 0.21)).verdict == "higher"
    assert variant("d", (1.0,), (0.2,)).verdict == "one seed says nothing"
    diverged = variant("e", (1.0, math.nan), (0.2, math.nan))
    assert diverged.verdict == "a loss is not finite"
    assert [doubt.kind for doubt in diverged.doubts] == ["few", "missing"]
    assert unclear.doubts == []
    assert [d.kind for d in variant("b", (1.0, 1.0), (-0.2, -0.2)).doubts] == ["few"]
    assert variant("r", (1.0,), None).doubts == []


def test_a_variant_of_another_budget_is_shown_and_not_compared() -> None:
    off = replace(variant("off", (1.0, 1.1), (-0.2, -0.2)), off_budget=0.031)
    near = replace(variant("near", (1.0, 1.1), (-0.2, -0.2)), off_budget=-0.009)
    outcome = Outcome("x", "Which?", "r", 4096, "a", (variant("r", (1.2, 1.3), None), off, near))
    table = markdown(outcome)
    assert "|  | not compared: its budget is +3.1% off |" in table
    assert near.verdict == "lower"
    labels = [text.get_text() for text in figure(outcome).axes[0].get_yticklabels()]
    assert labels == ["near"]
    # All of them have a place over what they cost.
    shown = frontier(outcome).axes[-1].get_legend_handles_labels()[1]
    assert shown == ["near", "r", "off"]


def test_budgets_that_no_method_fixes_are_those_of_the_last_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "equal": "activated",
        "overrides": [*TINY["overrides"], "logging.layer_interval=1"],
        "reference": "topk",
        "variants": {
            "topk": ["mone.keep_ratio=0.25"],
            "mass": ["mone.rule=mass", "mone.keep_ratio=0.25"],
            "dReLU": [
                "mone.rule=nonzero",
                "mone.score=abs_product",
                "model.activation=drelu",
                "mone.keep_ratio=0.25",
            ],
        },
    }
    read = load_study(write(tmp_path / "x.yaml", **changes))
    assert set(read.configs) == {"topk", "mass", "dReLU"}  # judged when they are trained
    done = study(tmp_path / "x.yaml", "--seeds", 1, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "x" / "study.json").read_text(encoding="utf-8"))
    budgets = {one["name"]: one["budget"]["activated"] for one in result["variants"]}
    config = read.configs["topk"]
    assert budgets["topk"] == value_of(config, "activated")

    metrics = tmp_path / "out" / "x" / "mass" / "seed_1" / "metrics.jsonl"
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    model = config.model
    visited = model.num_layers * model.experts_per_token
    kept = (last["mone/density"] - 0.25) * model.expert_ffn_hidden_size
    assert budgets["mass"] - budgets["topk"] == pytest.approx(
        visited * 2 * model.hidden_size * kept
    )
    # Where a gate is 0 no up projection is needed.
    drelu = metrics.parents[2] / "dReLU" / "seed_1" / "metrics.jsonl"
    used = json.loads(drelu.read_text(encoding="utf-8").splitlines()[-1])
    ups, kept = (used[f"mone/{name}"] - 0.25 for name in ("active_share", "density"))
    assert ups > kept
    assert budgets["dReLU"] - budgets["topk"] == pytest.approx(
        visited * model.hidden_size * (ups + kept) * model.expert_ffn_hidden_size
    )
    for name, budget in budgets.items():
        off = abs(budget / budgets["topk"] - 1)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {name} |")]
        assert ("not compared: its budget" in line) == (off > 0.01)

    # The planner matches what that run used, too.
    matched = [
        *("experiment=tiny_mone", "mone.rule=mass", "--match", "activated", "--side", "moe"),
        *("--tolerance", "0.05", "--json", str(tmp_path / "pair.json")),
    ]
    assert plan_main([*matched, "--measured", str(metrics.parent)]) == 0
    pair = json.loads((tmp_path / "pair.json").read_text(encoding="utf-8"))
    assert pair["mone"] == round(budgets["mass"])
    assert plan_main(matched) == 0
    assert "mone.rule=mass fixes no number of neurons; counted with" in capsys.readouterr().out
    matched[1:2] = read.variants["dReLU"]
    assert plan_main([*matched, "--measured", str(drelu.parent)]) == 0
    pair = json.loads((tmp_path / "pair.json").read_text(encoding="utf-8"))
    assert pair["mone"] == round(budgets["dReLU"])
    assert plan_main(matched) == 0
    assert "needs up projections where the gate is positive" in capsys.readouterr().out


def test_table_and_picture() -> None:
    outcome = Outcome(
        name="x",
        question="Which?",
        reference="r",
        tokens=4096,
        hardware="a machine",
        variants=(
            variant("r", (2.0, 2.2), None),
            variant("v", (1.9, 2.0), (-0.1, -0.2)),
        ),
    )
    table = markdown(outcome)
    assert "| r | 1.00K | 500 | 2.1000 ± 1.2706 |  | reference |" in table
    assert "| -0.1500 ± " in table
    # A bar in a name would end its cell.
    bars = replace(outcome, reference="|a|", variants=(replace(outcome.variants[0], name="|a|"),))
    assert "| \\|a\\| | 1.00K |" in markdown(bars)
    page = studies_page([outcome, replace(outcome, name="y", question="A < B?")])
    assert page.count("Loss against r: v: lower") + page.count("Loss against r: v: no diff") == 2
    assert "A &lt; B?" in page
    assert page.count("<img ") == 4
    labels = [text.get_text() for text in figure(outcome).axes[0].get_yticklabels()]
    assert labels == ["v"]
    why = "v: 2 seeds, at least 3 are needed to know its error"
    assert table.endswith(f"\nnot identified: {why}")
    assert "(not identified)" in page


def test_one_seed_and_a_diverged_one_are_told_and_written(tmp_path: Path) -> None:
    for losses, differences, cell in (
        ((1.9,), (-0.1,), "1.9000 (error unknown) | -0.1000 (error unknown)"),
        ((1.9, 1.8, math.nan), (-0.1, -0.2, math.nan), "a loss is not finite"),
        ((1.9, 1.8, 1.7), (-0.1, -0.2, -0.15), "lower |"),
    ):
        outcome = Outcome(
            name="x",
            question="Which?",
            reference="r",
            tokens=4096,
            hardware="a machine",
            variants=(variant("r", (2.0,) * len(losses), None), variant("v", losses, differences)),
        )
        table = markdown(outcome)
        assert cell in table
        assert "nan ±" not in table.replace("nan (error", "")
        assert ("not identified" in table) == (cell != "lower |")
        write_outcome(outcome, tmp_path)

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        text = (tmp_path / "study.json").read_text(encoding="utf-8")
        read = json.loads(text, parse_constant=refuse)["variants"]
        assert bool(read[1]["not_identified"]) == (cell != "lower |")
        assert read[0]["not_identified"] == []
