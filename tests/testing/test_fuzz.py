"""The fuzzer draws every method, tells what does not hold, and finds nothing in a few drawings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random

import pytest

from mone_megatron.config.marks import NameIn
from mone_megatron.config.reference import fields
from mone_megatron.config.schema import Config
from mone_megatron.testing.fuzz import fuzzing, trial
from mone_megatron.testing.fuzz.__main__ import main
from mone_megatron.testing.fuzz.agreement import different, disagreement
from mone_megatron.testing.fuzz.arguments import TOOLS, draw_call, odd_places, problem
from mone_megatron.testing.fuzz.corpora import make_corpora
from mone_megatron.testing.fuzz.drawing import (
    Corpora,
    Drawing,
    config_of,
    draw_valid,
    draw_wild,
    mended,
    parse,
    refusals,
)
from mone_megatron.testing.fuzz.faults import Fault
from mone_megatron.testing.fuzz.fields import NOT_DRAWN, keys
from mone_megatron.testing.fuzz.fuzzing import Fuzzer, _other_release, fuzz, refusal_faults
from mone_megatron.testing.fuzz.server import Server
from mone_megatron.testing.fuzz.shrink import shrunk

CORPORA: Corpora = {name: {"data.max_megabytes": "0.2"} for name in ("words", "blend", "stdlib")}
QUICK = ("resume", "counts", "export", "layout")
METHODS = [
    (key.name, name)
    for key in keys()
    for mark in key.field.marks
    if isinstance(mark, NameIn)
    for name in mark.registry.names
]


@pytest.mark.parametrize(("key", "name"), METHODS)
def test_every_method_can_be_drawn(key: str, name: str) -> None:
    """What it cannot be without is what refusals advise, or another method."""
    random = Random(0)
    for attempt in range(200):
        beside = dict([random.choice(METHODS)]) if attempt > 5 else {}
        drawing = mended(Drawing("tiny_mone", beside | {key: name}), CORPORA, random)
        if drawing is not None and drawing.overrides.get(key) == name:
            return
    pytest.fail(f"{key}={name} is always mended away")


def test_what_is_not_drawn_is_there() -> None:
    """So that a reason goes with its key."""
    known = {group.name for group in fields(Config)}
    assert {name.split(".")[0] for name in NOT_DRAWN} <= known
    drawn = {key.name for key in keys()}
    assert not [name for name in drawn if f"{name}.".startswith(tuple(NOT_DRAWN))]


def test_drawings_are_accepted_and_are_the_same_of_a_seed() -> None:
    drawings = [draw_valid(Random(seed), CORPORA) for seed in range(8)]
    assert drawings == [draw_valid(Random(seed), CORPORA) for seed in range(8)]
    assert not [problem for drawing in drawings for problem in refusals(drawing, CORPORA)]
    assert len({drawing.words for drawing in drawings}) > 4


def test_a_drawing_is_what_its_words_say() -> None:
    for seed in range(20):
        drawing = draw_wild(Random(seed))
        again = parse(drawing.words)
        assert again == drawing
    laid = parse("experiment=tiny_moe corpus=blend ranks=2 parallel.expert=2 mone.rule=mass")
    assert laid.layout == {"parallel.expert": "2"}
    assert (laid.ranks, laid.data, laid.overrides) == (2, "blend", {"mone.rule": "mass"})
    with pytest.raises(ValueError, match=r"--case: 'mone\.rule' is no key=value"):
        parse("mone.rule")


def test_a_configuration_without_hydra_is_hydras() -> None:
    from mone_megatron.config.load import compose

    drawing = parse(
        "experiment=tiny_mone model.router.balance=[aux_loss,seq_aux_loss] optim.eps=1e-05 "
        "model.router.balance_coeff=[0.01,0.0] mone.rule=mass mone.rule_options.p=0.5 "
        "train.eval_at_start=true"
    )
    assert config_of(drawing) == compose(drawing.settings())


def test_shrinking_leaves_what_the_fault_takes() -> None:
    overrides = {f"key{number}": str(number) for number in range(11)}
    drawing = Drawing("tiny_mone", overrides, {"parallel.expert": "2", "parallel.tensor": "2"}, 4)
    tried = []

    def fails(drawing: Drawing) -> bool:
        tried.append(drawing)
        return {"key3", "key8"} <= drawing.overrides.keys() and "parallel.expert" in drawing.layout

    small = shrunk(drawing, fails)
    assert small.overrides == {"key3": "3", "key8": "8"}
    assert small.layout == {"parallel.expert": "2"}
    assert small.experiment == "tiny_moe"
    assert len(tried) < 40


def test_faults_of_one_kind_differ_in_numbers_alone() -> None:
    one, other = (Fault("resume", f"step {n}: loss is {n}.5, not 1e-3") for n in (3, 4))
    assert one.kind == other.kind
    assert one.kind != Fault("resume", "step 3: grad_norm is 3.5, not 1e-3").kind


def record(step: int, loss: float, **more: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "router/tokens_per_expert": 1.0, **more}


def test_layouts_may_differ_by_rounding_and_more_after_a_flip() -> None:
    one = [record(1, 2.0), record(2, 2.0)]
    assert disagreement(one, [record(1, 2.00001), record(2, 2.0)]) == ""
    assert "step 2: loss" in disagreement(one, [record(1, 2.0), record(2, 2.0003)])
    flip = record(2, 2.0003) | {"router/tokens_per_expert": 1.5}
    assert disagreement(one, [record(1, 2.0), flip]) == ""
    assert "after a flip" in disagreement(one, [record(1, 2.0), flip | {"loss": 2.1}])
    assert "steps" in disagreement(one, one[:1])


def write(folder: Path, records: list[Mapping[str, float]]) -> Path:
    folder.mkdir()
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_resumed_run_may_lack_what_is_of_two_steps(tmp_path: Path) -> None:
    layer = {"mone/load_entropy/layer_1": 1.0, "mone/load_overlap/layer_1": 0.5}
    whole = write(tmp_path / "whole", [record(step, 2.0, **layer) for step in (1, 2, 3)])
    fewer = {"mone/load_entropy/layer_1": 1.0}
    right = write(tmp_path / "right", [record(2, 2.0, **fewer), record(3, 2.0, **layer)])
    assert different(whole, right) == ""
    wrong = write(tmp_path / "wrong", [record(2, 2.0, **fewer), record(3, 2.0, **fewer)])
    assert different(whole, wrong) == "step 3 mone/load_overlap/layer_1 is nothing, not 0.5"
    other = write(tmp_path / "other", [record(2, 2.5, **fewer)])
    assert different(whole, other) == "step 2 loss is 2.5, not 2.0"


def test_releases_are_compared_before_the_first_step_and_after_it(tmp_path: Path) -> None:
    begun = {"step": 0, "val_loss": 3.0}
    whole = write(tmp_path / "whole", [begun, record(1, 2.0)])
    assert _other_release(whole, whole) == ""
    other = write(tmp_path / "other", [begun | {"val_loss": 4.0}, record(1, 2.0)])
    assert _other_release(whole, other) == "step 0: val_loss is 4.0, not 3.0"
    less = write(tmp_path / "less", [begun, {"step": 1, "loss": 2.0}])
    assert _other_release(whole, less) == "step 1: grad_norm is None, not 1.0"


def test_refusals_name_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(0)
    assert [one for _ in range(40) for one in refusal_faults(random, CORPORA)] == []
    told = ["mone.rule: wrong; fix it", "something is wrong"]
    monkeypatch.setattr(fuzzing, "refusals", lambda drawing, corpora, ranks: told)
    ((_, fault),) = refusal_faults(random, CORPORA)
    assert fault == Fault("refusals", "no key is named: something is wrong")


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("model.router.kind: gives tokens different numbers of experts", False),
        ("the two models differ: lm_head.weight", True),
        ("model.norm.weight is missing", True),
    ],
)
def test_what_a_tool_refuses_is_no_fault(
    said: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tool(arguments: Sequence[str]) -> int:
        print(f"error: {said}", file=sys.stderr)
        return 2

    monkeypatch.setattr(trial, "load_tool", lambda name: tool)
    monkeypatch.setenv("MASTER_PORT", "0")
    tried = trial.Trial([], tmp_path, ["studies"])
    tried.studies()
    assert bool(tried.found) == wrong
    assert bool([made for made in tried.made if made.endswith(" refused")]) != wrong


@pytest.mark.parametrize("tool", TOOLS)
def test_odd_arguments_reach_every_option_of_a_tool(tool: str, tmp_path: Path) -> None:
    parser = import_module(f"mone_megatron.commands.{tool}")._parser()
    parser.parse_args(TOOLS[tool]("run", "text", "new"))
    (odd := tmp_path / "odd").mkdir()
    places, random = odd_places(odd), Random(1)
    drawn = [draw_call(random, "run", "text", places, "new") for _ in range(4000)]
    wanted = {
        action.option_strings[-1] if action.option_strings else action.dest
        for action in parser._actions
        if action.nargs != 0
    }
    assert {one.option for one in drawn if one.tool == tool} == wanted
    assert all(one.value in one.arguments for one in drawn)


def test_what_is_wrong_with_an_answer_to_odd_arguments(tmp_path: Path) -> None:
    (odd := tmp_path / "odd").mkdir()
    odd_places(odd)
    assert problem(0, [], "", odd) == problem(2, ["error: a"], "", odd) == ""
    assert problem(None, [], "KeyError: 'a' (run.py)", odd).startswith("a traceback")
    assert problem(3, [], "", odd) == "ended with 3"
    assert problem(2, [], "", odd) == "0 lines of errors"
    assert problem(2, ["error: a", "error: b"], "", odd) == "2 lines of errors"
    device = next(path for path in odd.iterdir() if path.is_char_device())
    device.unlink()
    device.touch()
    assert problem(0, [], "", odd) == "a file took the place of a device"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    corpora = make_corpora(tmp_path_factory.mktemp("corpora"))
    with Server(Path(sys.executable)) as server:
        yield Fuzzer(server, corpora, tmp_path_factory.mktemp("runs"), QUICK)


def test_a_few_drawings_hold(fuzzer: Fuzzer) -> None:
    """The short run that ``make test`` has of ``make fuzz``."""
    seen: list[int] = []
    report = fuzz(
        fuzzer,
        Random(4),
        seconds=600,
        drawings=3,
        show=lambda text: None,
        progress=lambda report: seen.append(report.drawings),
    )
    assert {fault.what for _, fault in report.found.values()} == set()
    assert seen == [1, 2, 3]
    assert fuzzer.made["train"] == 3
    assert not any(fuzzer.folder.iterdir())


def test_a_fault_is_told_once_and_shrunk(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def faults(drawing: Drawing, checks: Sequence[str]) -> list[Fault]:
        return [Fault("counts", "1 of 2")] if drawing.experiment == "tiny_mone" else []

    monkeypatch.setattr(fuzzer, "faults", faults)
    report = fuzz(
        fuzzer,
        Random(0),
        seconds=600,
        drawings=8,
        show=told.append,
        progress=lambda report: None,
    )
    ((kind, (smallest, fault)),) = report.found.items()
    assert fault == Fault("counts", "1 of 2")
    assert smallest == Drawing("tiny_mone", {})
    assert report.again[kind] > 0
    assert len(told) == 2


def test_a_refusal_that_names_its_key_is_no_fault(fuzzer: Fuzzer) -> None:
    corpora = {"words": {"data.source": "indexed", "data.paths": "[/nowhere/at/all]"}}
    lost = replace(fuzzer, corpora=corpora, made=Counter())
    assert lost.faults(parse("model.num_layers=1")) == []
    assert lost.made == {"refused": 1}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seconds", "0"], "--seconds: 0 is not above 0"),
        (["--case", "mone.rule"], "--case: 'mone.rule' is no key=value"),
        (["--case", "model.num_layers=0"], "model.num_layers: 0 is too small"),
        (["--case", "corpus=web"], "--case: corpus=web is none of words, blend, stdlib"),
        (["--later", "/nowhere/python"], "--later: /nowhere/python is not there"),
    ],
)
def test_what_cannot_be_tried_is_said(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--corpora", str(tmp_path)]) == 2
    assert f"error: {told}" in capsys.readouterr().err
