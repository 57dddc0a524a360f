"""tools/analyze_run.py: runs, models and traces, what it writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chromium_browser import Browser
from hf_models import save_model
from routing_traces import make_trace

from mone_megatron.config.load import CONF_DIR
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.tools import Main, load_tool

TOOL = CONF_DIR.parent / "tools" / "analyze_run.py"


@pytest.fixture(scope="module")
def main() -> Main:
    return load_tool("analyze_run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours that saved after steps 1 and 2, with its report."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "experiment=tiny_mone", "device.kind=cpu", "train.steps=2", "train.eval_interval=2",
        "train.eval_steps=2", "checkpoint.interval=1", "data.max_megabytes=0.3",
        "data.vocab_size=400", f"data.cache_dir={folder / 'cache'}", "logging.layer_interval=1",
        "logging.wandb.mode=disabled", "logging.progress=none",
    ]  # fmt: skip
    run_layouts({"mone": overrides}, processes=1, folder=folder)
    return folder / "mone"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two domains: one is the word of one token type many times."""
    folder = tmp_path_factory.mktemp("texts")
    code, plain = folder / "code.txt", folder / "plain.txt"
    code.write_text(TOOL.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    plain.write_text(" the" * 300, encoding="utf-8")
    return [code, plain]


def test_checkpoints_of_a_run_against_the_last(
    main: Main, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = main(
        [str(trained), "--text", str(trained), "--output", str(out), "--trace",
         str(tmp_path / "traces"), "--max-tokens", "512"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "mone step 2, 512 tokens" in printed.out
    assert "recording mone step 1: 100%" in printed.err
    assert "measuring mone step 2: 100%" in printed.err
    result = json.loads((out / "analysis.json").read_text())
    first, last = result["checkpoints"]
    assert [first["step"], last["step"]] == [1, 2]
    assert result["selection"] == {"keep_ratio": 0.25, "score": "abs_activation", "by": "model"}
    for layer in first["layers"]:
        assert layer["kept"] == round(0.25 * layer["neurons"])
        # A step apart: much is as it was, and more than chance.
        assert 0.5 < layer["expert_saturation"] <= 1
        assert layer["neuron_saturation_by_load"] < layer["neuron_saturation"] <= 1
        assert len(layer["expert_saturation_top"]) == layer["top_k"]
        assert layer["expert_saturation_top"][-1] == layer["expert_saturation"]
    assert all(layer["expert_saturation"] is None for layer in last["layers"])
    experts = pq.read_table(out / "experts.parquet").to_pandas()
    layers = len(last["layers"])
    assert len(experts) == 2 * layers * last["layers"][0]["experts"]
    loads = experts.groupby(["step", "layer"])["load"].sum()
    assert loads.to_numpy() == pytest.approx(last["layers"][0]["top_k"])
    summaries = pq.read_table(out / "layers.parquet").to_pylist()
    assert [row["neuron_saturation"] for row in summaries[:layers]] == [
        layer["neuron_saturation"] for layer in first["layers"]
    ]
    neurons = pq.read_table(out / "neurons.parquet").to_pandas()
    kept = neurons.groupby(["step", "layer"])["kept"].sum()
    assert (kept == 512 * last["layers"][0]["top_k"] * last["layers"][0]["kept"]).all()
    unions = pq.read_table(out / "chunk_unions.parquet").to_pandas()
    for layer in last["layers"]:
        union = layer["chunk_unions"]
        one_token = layer["top_k"] * layer["kept"] / (layer["experts"] * layer["neurons"])
        assert union["tokens"] == [1, 2, 4, 8, 16, 32]
        assert union["share"][0] == union["share_by_load"][0] == pytest.approx(one_token)
        assert union["share"] == sorted(union["share"])
        # More than one token keeps, and less than if no two of 32 shared any.
        assert one_token < union["share"][-1] < min(1, 32 * one_token)
        rows = unions[(unions["step"] == 2) & (unions["layer"] == layer["layer"])]
        assert rows["share"].tolist() == union["share"]
    for name in ("load", "coactivation", "saturation", "specialisation", "neurons", "unions"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # The traces are taken again, and give the same.
    folders = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert folders == ["mone_step_1", "mone_step_2"]
    again = tmp_path / "again"
    code = main(
        [str(trained), "--text", str(trained), "--output", str(again), "--trace",
         str(tmp_path / "traces"), "--max-tokens", "512"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0
    assert printed.err.count("uses the trace in") == 2
    assert "recording" not in printed.err
    other = json.loads((again / "analysis.json").read_text())
    assert other | {"how": None} == result | {"how": None}
    # Not of another text.
    code = main(
        [str(trained), "--text", str(trained), "--output", str(tmp_path / "third"), "--trace",
         str(tmp_path / "traces"), "--max-tokens", "256"]
    )  # fmt: skip
    assert code == 2
    assert "holds a trace of this model on another text" in capsys.readouterr().err


def test_a_real_runs_report_has_no_errors(browser: Browser, trained: Path) -> None:
    tab = browser.open(trained / "report.html")
    assert tab.evaluate("document.querySelectorAll('.chart svg').length") > 3
    assert tab.problems() == []
    tab.close()


def test_domains_are_files_or_a_field(
    main: Main, moe: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "all.jsonl"
    rows = [{"text": path.read_text(), "kind": path.stem} for path in texts]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = []
    for name, arguments in (
        ("files", ["--text", *map(str, texts)]),
        ("field", ["--text", str(lines), "--domain-field", "kind"]),
    ):
        out = tmp_path / name
        code = main(
            [str(moe), *arguments, "--output", str(out), "--seq-length", "32", "--keep-ratio",
             "0.5", "--max-tokens", "600", "--trace", str(tmp_path / f"traces_{name}")]
        )  # fmt: skip
        assert code == 0, capsys.readouterr().err
        tables.append(pq.read_table(out / "expert_domains.parquet").to_pandas())
    assert tables[0].equals(tables[1])
    # The trace is not that of another ratio or other domains.
    again = [str(moe), "--output", str(tmp_path / "out"), "--seq-length", "32", "--max-tokens",
             "600", "--trace", str(tmp_path / "traces_files")]  # fmt: skip
    assert main([*again, "--text", *map(str, texts), "--keep-ratio", "0.25"]) == 2
    assert "holds a trace with --keep-ratio 0.5 --score abs_act" in capsys.readouterr().err
    assert main([*again, "--text", *map(str, texts[::-1]), "--keep-ratio", "0.5"]) == 2
    assert "another text, in other windows or domains" in capsys.readouterr().err
    assert set(tables[0]["domain"]) == {"code", "plain"}
    result = json.loads((tmp_path / "files" / "analysis.json").read_text())
    assert result["selection"]["by"] == "analysis"
    (checkpoint,) = result["checkpoints"]
    assert checkpoint["step"] is None
    # One token again and again is routed as no text is.
    assert all(layer["domain_specialisation"] > 0.1 for layer in checkpoint["layers"])
    tokens = pq.read_table(tmp_path / "files" / "expert_tokens.parquet").to_pandas()
    shares = tokens.groupby(["layer", "token_id"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(2)


def test_the_output_folder_is_looked_at_before_anything_is_read(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace(tmp_path / "trace", {1: [[0, 1], [1, 2]]}, experts=3).folder
    out, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "summary.json").write_text("mine")
    assert main([str(trace), "--output", str(out)]) == 0
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    cases = [
        (["nowhere", "--output", "/proc/nowhere"], "--output: cannot use '/proc/nowhere'"),
        (["nowhere", "--output", str(full)], "full holds files and no analysis.json; give a fol"),
        ([str(trace), "--output", str(full / "summary.json")], "--output: cannot use"),
        (["nowhere", "--output", str(out)], "other options: models was"),
        ([str(trace), "--output", str(out), "--min-count", "3"], "min_count was 8 and is 3; give"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        assert main(arguments) == 2, message
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made
    assert [path.name for path in full.iterdir()] == ["summary.json"]
    # The same again may.
    assert main([str(trace), "--output", str(out)]) == 0
    (out / "analysis.json").write_text("{")
    assert main([str(trace), "--output", str(out)]) == 2
    assert "analysis.json: is damaged" in capsys.readouterr().err


def test_traces_need_no_transformers(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", {1: [[0, 1], [1, 2]]}, experts=3).folder
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "found = {'transformers', 'megatron', 'mone_megatron.train'} & set(sys.modules)\n"
        "assert not found, found"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(TOOL), str(trace), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "routing.html").is_file()


def test_what_cannot_be_analysed_is_refused_in_one_line(
    main: Main,
    moe: Path,
    tokenizer: Path,
    texts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense = save_model("llama", tmp_path / "dense", tokenizer)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    empty, blank = tmp_path / "empty.txt", tmp_path / "blank.jsonl"
    empty.write_text("")
    blank.write_text('{"text": "", "kind": "a"}\n')
    one = make_trace(tmp_path / "one", {1: [[0, 1], [1, 2]]}, experts=3, name="one")
    two = make_trace(tmp_path / "two", {1: [[0, 1], [1, 2]]}, experts=4, name="two")
    kept = make_trace(tmp_path / "traces" / "olmoe", {1: [[0, 1]]}, experts=3, name="kept")
    broken = make_trace(tmp_path / "broken", {1: [[0, 1]]}, experts=3)
    shard = broken.folder / "shard-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-10])
    text = ["--text", str(texts[0])]
    cases: list[tuple[list[str], str]] = [
        ([str(dense), *text], "dense: LlamaForCausalLM has no experts"),
        ([str(run), *text], "this run has no checkpoint; save some with checkpoint.interval"),
        ([str(moe)], "--text: give what the models are to read"),
        ([str(moe), "--text", str(empty)], f"{empty}: empty"),
        ([str(moe), "--text", str(blank)], "holds no text"),
        ([str(moe), "--text", str(blank), "--domain-field", "kind"], "hold no text"),
        ([str(moe), "--text", str(blank), "--domain-field", "no"], "no key 'no'"),
        ([str(moe), *text, "--trace", str(kept.folder.parent)], "the trace of another model"),
        ([str(one.folder), str(two.folder)], "two: is another model than one"),
        ([str(one.folder), str(one.folder)], "named twice"),
        ([str(broken.folder)], "the trace is truncated"),
        ([str(tmp_path / "nothing"), *text], "nothing"),
        ([str(run / "checkpoints"), *text], "holds neither checkpoints nor config.json"),
        ([str(moe), *text, "--num-experts", "4"], "--num-experts: of use with traces of Meg"),
        ([str(one.folder), *text], "--text: traces hold what was read"),
        ([str(one.folder), "--keep-ratio", "0.5"], "--keep-ratio: traces hold what was read"),
        ([str(moe), *text, "--keep-ratio", "1.5"], "--keep-ratio: 1.5 is not in (0, 1]"),
        ([str(moe), *text, "--batch-size", "0"], "--batch-size: 0 is too small"),
    ]
    for arguments, message in cases:
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2, message
        printed = capsys.readouterr().err
        assert message in printed, (message, printed)
        said = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, printed
    assert not (tmp_path / "out").exists()
