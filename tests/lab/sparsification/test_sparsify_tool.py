"""tools/sparsify_hf.py: what it measures, writes and takes up again, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import VOCABULARY, random_model
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sparsify_helpers import TEXT, Main, load_sparsify_tool
from test_import import import_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mone_megatron.config.load import CONF_DIR
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.evaluation.corpora import Reader, open_corpus
from mone_megatron.evaluation.example_tasks import write_example_tasks
from mone_megatron.evaluation.perplexity import measure_perplexity
from mone_megatron.lab.sparsification import result_files
from mone_megatron.lab.sparsification.plans import uniform
from mone_megatron.lab.sparsification.resident import ResidentEngine
from mone_megatron.report.plots import png_bytes


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else here."""
    monkeypatch.setattr(result_files, "figures", lambda studies: ())


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn with all that is in them, but small and without looking for the best layout."""

    def small(figure: Figure) -> bytes:
        figure.set_layout_engine("none")
        figure.set_dpi(20)
        return png_bytes(figure)

    monkeypatch.setattr(result_files, "png_bytes", small)


@pytest.fixture(scope="module")
def main() -> Main:
    return load_sparsify_tool()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, texts and tasks."""
    folder = tmp_path_factory.mktemp("sparsify")
    tokenizer = train_tokenizer([TEXT], VOCABULARY)
    for name in ("qwen3_moe", "llama"):
        random_model(name).save_pretrained(folder / name)
        save_tokenizer(tokenizer, folder / name)
    (folder / "text.txt").write_text(TEXT[:1500], encoding="utf-8")
    (folder / "other.txt").write_text(TEXT[1500:2500], encoding="utf-8")
    write_example_tasks(folder / "tasks")
    return folder


def run(main: Main, place: Path, folder: Path, *more: object, models: tuple[str, ...]) -> list[str]:
    arguments = [
        *(str(place / model) for model in models), "--perplexity", str(place / "text.txt"),
        "--output", str(folder), "--seq-length", "64", *map(str, more),
    ]  # fmt: skip
    assert main(arguments) == 0
    return (folder / "results.jsonl").read_text().splitlines()


def test_everything_of_two_models(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick_figures: None,
) -> None:
    tasks = ("--tasks", place / "tasks" / "stdlib_next_line.yaml", "--limit", 4)
    more = (
        *tasks,
        "--scores", "abs_activation", "random", "--shares", 0, 0.5, 0.9, "--top", 0.5, 0.1,
        "--loss-budget", 0.02, "--calibration", place / "other.txt", "--budget-shares", 0.25, 0.75,
    )  # fmt: skip
    models = ("qwen3_moe", "llama")
    run(main, place, tmp_path / "out", *more, models=models)
    printed = capsys.readouterr()
    assert "qwen3_moe: reading" in printed.err
    assert "100% of" in printed.err
    # The harness shows no bars among our lines.
    assert "loglikelihood" not in printed.err
    assert "left" in printed.err

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = dict(zip(models, summary["models"], strict=True))
    assert found["qwen3_moe"]["targets"] == ["routed"]
    assert found["llama"]["targets"] == ["dense"]
    reader = Reader(AutoTokenizer.from_pretrained(place / "llama"), VOCABULARY, 64)
    windows = open_corpus(str(place / "text.txt")).windows(reader)
    for name, study in found.items():
        model = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32).eval()
        plain = measure_perplexity(model, windows, bytes_of_token=None, batch_size=8)
        engine = ResidentEngine(model, study["targets"], seed=1234)
        for point in [study["dense"], *study["points"]]:
            by_metric = {score["metric"]: score for score in point["scores"]}
            assert set(by_metric) == {"acc", "acc_norm", "loss", "perplexity", "bits_per_byte"}
            loss = by_metric["loss"]
            assert loss["difference"]["paired"]
            assert loss["samples"] == len(windows)
            if point["share"] == 0:
                # Bitwise the model as it is.
                assert loss["value"] == plain.loss.value
                assert loss["difference"]["value"] == 0
                continue
            with engine.pruning(uniform(point["score"], point["share"], 3)):
                pruned = measure_perplexity(model, windows, bytes_of_token=None, batch_size=8)
            assert loss["value"] == pruned.loss.value
            assert loss["difference"]["value"] == pytest.approx(
                pruned.loss.value - plain.loss.value
            )
            assert 0 < loss["difference"]["stderr"] < loss["stderr"]
        assert [point["share"] for point in study["points"]] == [0, 0.5, 0.9] * 2
        budget = study["budget"]
        assert budget["measured"]["value"] <= 0.02
        kept = [probe for probe in budget["probes"] if probe["pruned"] == budget["pruned"]]
        assert [probe["measured"] for probe in kept] == [budget["measured"]["value"]]
        assert len(budget["sensitivity"]) == len(budget["shares"]) == 3
        assert {*budget["shares"]} <= {0, 0.25, 0.75}
        assert budget["measured_on_other_text"] is not None
        assert budget["uniform_measured"]["value"] is not None

    with (tmp_path / "out" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    # The unpruned model once; two scores with two shares above 0; two models, five metrics.
    assert len(rows) == 2 * (1 + 2 * 2) * 5
    with (tmp_path / "out" / "thresholds.csv").open() as file:
        thresholds = list(csv.DictReader(file))
    assert len(thresholds) == 2 * 3 * 2
    assert all(float(row["pooled"]) > 0 for row in thresholds)
    names = {
        "sparsification", "relative", "thresholds", "rise_llama", "rise_qwen3_moe",
        "scores_llama", "scores_qwen3_moe", "activations_llama", "mass_llama",
        "budget_llama", "activations_qwen3_moe", "mass_qwen3_moe", "budget_qwen3_moe",
    }  # fmt: skip
    pictures = {path.stem: path for path in (tmp_path / "out").glob("*.png")}
    assert set(pictures) == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures.values())


def test_what_was_measured_is_taken_up_again(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_figures: None,
) -> None:
    base = [str(place / "llama"), "--perplexity", str(place / "text.txt"), "--seq-length", "64"]
    base += ["--output", str(tmp_path / "out")]
    arguments = [*base, "--shares", "0", "0.5"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "llama: reading" in first.err
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    # Nothing is left to do, and the same comes out.
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert "reading" not in again.err
    assert again.out == first.out
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines
    # As if it had been killed on the way: what is missing is measured again, to the same numbers.
    (tmp_path / "out" / "results.jsonl").write_text(lines[: len(lines) // 2])
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines
    # Other shares are added.
    assert main([*base, "--shares", "0.5", "0.7"]) == 0
    assert "loss under one pruning" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").read_text().startswith(lines)
    # Other settings, texts and weights are refused.
    assert main([*base, "--batch-size", "4"]) == 2
    assert "of other settings: batch_size was 8 and is 4" in capsys.readouterr().err
    assert main([*base, "--perplexity", str(place / "other.txt")]) == 2
    assert "of other models or text: text was" in capsys.readouterr().err
    assert main([str(place / "qwen3_moe"), *base[1:], "--labels", "llama"]) == 2
    assert "of other models or text: targets was ['dense']" in capsys.readouterr().err


def test_thresholds_are_set_on_one_text_and_measured_on_another(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick_figures: None,
) -> None:
    calibration = ["--calibration", str(place / "other.txt")]
    base = [str(place / "qwen3_moe"), "--perplexity", str(place / "text.txt"), "--seq-length", "64"]
    base += ["--shares", "0.5", "0.75"]
    both = [*base, "--rule", "threshold", "rank", *calibration, "--output", str(tmp_path / "out")]
    assert main(both) == 0
    first = capsys.readouterr()
    (study,) = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]
    points = {(point["rule"], point["share"]): point for point in study["points"]}
    assert set(points) == {(rule, share) for rule in ("threshold", "rank") for share in (0.5, 0.75)}
    for (rule, share), point in points.items():
        # Ranks prune what they are told; of thresholds it is what came on this text.
        assert (point["pruned"] == share) == (rule == "rank")
        assert point["pruned"] == pytest.approx(share, abs=0.15)
        assert point["activated"] == pytest.approx((1 + 2 * (1 - point["pruned"])) / 3)
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    # Nothing is left to do; a text or kind of threshold that is another one is measured anew.
    assert main(both) == 0
    again = capsys.readouterr()
    assert "reading" not in again.err
    assert again.out == first.out
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines
    assert main([*both, "--threshold-of", "expert"]) == 0
    assert "loss under 2 prunings" in capsys.readouterr().err
    assert main([*both, "--calibration-tokens", "200"]) == 0
    assert "loss under 2 prunings" in capsys.readouterr().err
    # A layer at a time it is the same.
    assert main([*both[:-1], str(tmp_path / "streamed"), "--stream"]) == 0
    assert capsys.readouterr().out.replace("streamed", "out") == first.out


def test_removal_and_truncation_stand_beside_what_is_pruned(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick_figures: None,
) -> None:
    base = ["--perplexity", str(place / "text.txt"), "--seq-length", "64", "--shares", "0.5"]
    base += ["--calibration", str(place / "other.txt"), "--cett", "0.2", "--ppl-rise", "1"]
    ways = ["neurons", "reap", "naee", "naee_skip", "super_experts"]
    arguments = [str(place / "qwen3_moe"), *base, "--remove", *ways]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out
    (study,) = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]
    removals = {one["way"]: one for one in study["removals"]}
    assert set(removals) == {*ways, "other_experts"}
    held = {way: one["held"] for way, one in removals.items()}
    assert held["neurons"] == held["reap"] == held["naee"] == 0.5
    assert held["naee_skip"] == 1
    assert removals["neurons"]["activated"] == 0.5
    assert removals["reap"]["activated"] == removals["naee"]["activated"] == 1
    assert removals["naee_skip"]["activated"] == pytest.approx(0.5)
    assert len(removals["super_experts"]["experts"]) == len(removals["other_experts"]["experts"])
    fixed, found = study["truncations"]
    assert (fixed["asked"], found["ppl_rise"]) == (0.2, 1)
    assert 0 < fixed["activation_ratio"] < 1
    assert found["perplexity_rise_on_calibration"] <= 1
    with (tmp_path / "out" / "granularity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["removed"] for row in rows] == [*removals, "abs_activation, per token"]
    assert (tmp_path / "out" / "granularity_qwen3_moe.png").exists()
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines
    # A layer at a time it is the same.
    assert main([*arguments, "--output", str(tmp_path / "streamed"), "--stream"]) == 0
    assert capsys.readouterr().out.replace("streamed", "out") == first


def test_broken_weights_are_told_and_may_be_put_right(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_figures: None,
) -> None:
    folder = shutil.copytree(place / "llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    base = [str(folder), "--perplexity", str(place / "text.txt"), "--seq-length", "64"]
    base += ["--shares", "0", "0.5", "--output", str(tmp_path / "out")]
    weights.write_bytes(whole[: len(whole) // 2])
    for stream in ([], ["--stream"]):
        arguments = [*base[:-1], str(tmp_path / f"cut{len(stream)}"), *stream]
        assert main(arguments) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ")
        assert "truncated or damaged" in told
    weights.write_bytes(whole)
    assert main(arguments) == 0
    # Other weights of the same sizes are other weights.
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(arguments) == 2
    assert "of other models or text: weights was" in capsys.readouterr().err
    # Numbers that are none are not drawn as a curve.
    tensors["model.embed_tokens.weight"] *= torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(base) == 2
    assert "llama: the loss with nothing pruned is nan" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]


def test_a_checkpoint_of_ours_streams(
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_figures: None,
) -> None:
    import_model(place / "qwen3_moe", place / "ours")
    more = (
        "--shares", 0.5, 0.9, "--loss-budget", 0.01, "--budget-score", "abs_product",
        "--labels", "model", "--experts-only", "--limit", 6,
        "--tasks", *sorted((place / "tasks").glob("*.yaml")),
    )  # fmt: skip
    tables = []
    for model, stream in (("qwen3_moe", ()), ("ours", ("--stream",))):
        folder = tmp_path / f"{model}{len(stream)}"
        run(main, place, folder, *more, *stream, models=(model,))
        tables.append(capsys.readouterr().out.replace(str(folder), "OUT"))
    assert tables[1] == tables[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL: give at least one"),
        (["MOE"], "--perplexity: give a corpus"),
        (["MOE", "TEXT"], "--output: give a folder"),
        (["MOE", "TEXT", "OUT", "--scores", "size"], "--scores: 'size' is unknown"),
        (["MOE", "TEXT", "OUT", "--shares", "1"], "--shares: 1 is not in [0, 1)"),
        (["MOE", "TEXT", "OUT", "--shares", "-0.5"], "--shares: -0.5 is not in [0, 1)"),
        (["MOE", "TEXT", "OUT", "--top", "0"], "--top: 0 is not in (0, 1]"),
        (["MOE", "MOE", "TEXT", "OUT"], "one model is named twice"),
        (["MOE", "TEXT", "OUT", "--batch-size", "0"], "--batch-size: 0 is too small"),
        (["MOE", "TEXT", "OUT", "--budget-shares", "0.5"], "of use with --loss-budget only"),
        (["MOE", "TEXT", "OUT", "--loss-budget", "0"], "--loss-budget: 0 is not above 0"),
        (["MOE", "TEXT", "OUT", "--stream-memory", "inf"], "--stream-memory: inf is no size above"),
        (["MOE", "TEXT", "OUT", "--stream-memory", "nan"], "--stream-memory: nan is no size above"),
        (["MOE", "TEXT", "OUT", "--loss-budget", "1", "--shares", "0"], "at least one share above"),
        (
            ["MOE", "TEXT", "OUT", "--stream", "--trust-remote-code"],
            "leave --trust-remote-code out",
        ),
        (["MOE", "TEXT", "OUT", "--rule", "best"], "--rule: 'best' is unknown; use some of rank, "),
        (["MOE", "TEXT", "OUT", "--rule", "threshold"], "--rule threshold: give --calibration"),
        (["MOE", "TEXT", "OUT", "--threshold-of", "expert"], "of use with --rule threshold only"),
        (
            ["MOE", "TEXT", "OUT", "CALIBRATED", "--rule", "threshold", "--threshold-of", "row"],
            "--threshold-of: 'row' is unknown; use some of layer, expert",
        ),
        (
            ["MOE", "TEXT", "OUT", "CALIBRATED", "--rule", "threshold", "--scores", "random"],
            "leave random out of --scores",
        ),
        (["MOE", "TEXT", "OUT", "CALIBRATED"], "--calibration: nothing is calibrated; add"),
        (["MOE", "TEXT", "OUT", "--remove", "reap"], "--remove: give --calibration CORPUS"),
        (["MOE", "TEXT", "OUT", "CALIBRATED", "--remove", "most"], "--remove: 'most' is unknown"),
        (
            ["DENSE", "TEXT", "OUT", "CALIBRATED", "--remove", "neurons", "reap"],
            "--remove: reap removes routed experts, and of LlamaForCausalLM none are pruned; use",
        ),
        (["MOE", "TEXT", "OUT", "--cett", "0.2"], "--cett: give --calibration CORPUS"),
        (["MOE", "TEXT", "OUT", "CALIBRATED", "--cett", "1"], "--cett: 1 is not in (0, 1)"),
        (["MOE", "TEXT", "OUT", "CALIBRATED", "--ppl-rise", "0"], "--ppl-rise: 0 is not above 0"),
        (
            ["MOE", "TEXT", "OUT", "--calibration", "SHORT", "--rule", "threshold"],
            "and at least 128 are needed; give a longer text",
        ),
        (["MOE", "EMPTY", "OUT"], "empty"),
        (["MOE", "BLANK", "OUT"], "holds no text"),
        (["MOE", "TEXT", "FULL"], "holds files and no results.jsonl"),
        (["DENSE", "TEXT", "OUT", "--experts-only"], "LlamaForCausalLM has no routed neurons"),
        (["MOE", "TEXT", "OUT", "--apply-to", "shared"], "has no shared neurons, only routed"),
        (["GPT2", "TEXT", "OUT"], "GPT2LMHeadModel has no decoder layers of the usual kind"),
        (["GPT_OSS", "TEXT", "OUT"], "abs_activation needs |a|, and these experts"),
        (["nowhere/at/all", "TEXT", "OUT"], "nowhere/at/all: neither a folder with a model"),
        (["MOE", "TEXT", "OUT", "--seq-length", "999"], "--seq-length: 999 is more"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str],
    message: str,
    main: Main,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    words = {
        "MOE": [str(place / "qwen3_moe")],
        "DENSE": [str(place / "llama")],
        "TEXT": ["--perplexity", str(place / "text.txt")],
        "EMPTY": ["--perplexity", str(tmp_path / "empty.txt")],
        "BLANK": ["--perplexity", str(tmp_path / "blank.jsonl")],
        "OUT": ["--output", str(tmp_path / "out")],
        "FULL": ["--output", str(tmp_path / "full")],
        "CALIBRATED": ["--calibration", str(place / "other.txt")],
        "SHORT": [str(tmp_path / "short.txt")],
    }
    for name, sizes in {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
        "gpt_oss": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    }.items():
        if name.upper() in arguments:
            # Refused before any weights are looked for.
            config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **sizes)
            config.save_pretrained(tmp_path / name)
            save_tokenizer(train_tokenizer([TEXT], VOCABULARY), tmp_path / name)
            words[name.upper()] = [str(tmp_path / name)]
    given = [word for argument in arguments for word in words.get(argument, [argument])]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_refusals_are_quick(place: Path, tmp_path: Path) -> None:
    """No second is spent on importing torch to say that an option is wrong."""
    tool = CONF_DIR.parent / "tools" / "sparsify_hf.py"
    arguments = ["sparsify_hf", str(place / "llama"), "--perplexity", "text", "--output", "out"]
    program = (
        f"import runpy, sys; sys.argv = {[*arguments, '--shares', '2']!r}\n"
        f"try: runpy.run_path({str(tool)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_a_streamed_model_writes_no_text(
    main: Main, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.jsonl").write_text('{"q": "1 + 1 =", "a": "2"}\n' * 2)
    (tmp_path / "write.yaml").write_text(
        "task: write\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "generation_kwargs: {until: ['.']}\nmetric_list: [{metric: exact_match}]\n"
    )
    arguments = [
        str(place / "llama"), "--perplexity", str(place / "text.txt"), "--stream",
        "--output", str(tmp_path / "out"), "--tasks", str(tmp_path / "write.yaml"),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "error: --stream: write has the model write text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
