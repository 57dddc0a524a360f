"""How documents began stays known: in a run's checkpoint, its export, and what is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_models import save_model
from test_export import export_run, open_run
from test_import import import_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_megatron.data.framing import Framing
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.evaluation.evaluate import Settings, evaluate_model
from mone_megatron.evaluation.models import look_at
from mone_megatron.evaluation.tasks import TaskRequest, load_tasks
from mone_megatron.hf.loading import load_model
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.tokenizers import with_bos
from mone_megatron.testing.tools import load_tool
from mone_megatron.train.resume.identity import other_framing

EOS = 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Two runs whose tokenizer adds a BOS: documents begin with it, and without."""
    folder = tmp_path_factory.mktemp("runs")
    with_bos(tokenizer_dir, folder / "bos")
    (folder / "a.txt").write_text("one two three four five six\n" * 400)
    jobs = {}
    for choice in ("auto", "never"):
        settings = TokenizerSettings(folder=folder / "bos", bos=choice)  # type: ignore[arg-type]
        preprocess_files([folder / "a.txt"], folder / choice, settings)
        jobs[f"run_{choice}"] = [
            "experiment=tiny_moe", "device=cpu", "data=indexed", f"data.paths=[{folder / choice}]",
            f"data.cache_dir={folder / 'cache'}", "data.split=[1,0,0]", "train.steps=1",
            "train.eval_interval=0", "checkpoint.interval=1", "logging=quiet",
            f"train.eval_tasks=[{tasks_on(folder)}]", "train.eval_tasks_interval=1",
        ]  # fmt: skip
    run_layouts(jobs, processes=1, folder=folder)
    return folder


def tasks_on(folder: Path) -> Path:
    """A task of whole texts, one of them longer than the model reads at once."""
    texts = ["one two three", "four five six\n" * 40]
    (folder / "rolling.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    settings = {
        "task": "rolling", "dataset_path": "json", "test_split": "test", "doc_to_text": "",
        "dataset_kwargs": {"data_files": {"test": "rolling.jsonl"}}, "doc_to_target": "text",
        "output_type": "loglikelihood_rolling", "metric_list": [metric],
    }  # fmt: skip
    path = folder / "rolling.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_tasks_during_training_begin_as_tasks_after_it(runs: Path) -> None:
    found = {}
    for choice in ("auto", "never"):
        run = runs / f"run_{choice}"
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        during = records[-1]["eval/rolling/bits_per_byte"]
        tasks = load_tasks([TaskRequest(str(runs / "rolling.yaml"))])
        how = Settings(4, None, 64, None, torch.float32, "cpu")
        result = evaluate_model(
            look_at(str(run)), label="run", tasks=tasks, corpora=[], settings=how, say=print
        )
        (after,) = [score.estimate.value for score in result.scores]
        assert during == pytest.approx(after, rel=1e-4)
        found[choice] = during
    assert found["auto"] != pytest.approx(found["never"], rel=1e-4)


def bos_of(folder: Path) -> int:
    bos: int = AutoTokenizer.from_pretrained(folder / "bos").convert_tokens_to_ids("<s>")
    return bos


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_from_corpus_to_export_and_back(choice: str, runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / f"run_{choice}")
    bos = bos_of(runs)
    opening = [bos] if choice == "auto" else []
    kept = {"opening": opening, "eod": EOS, "parse_special_tokens": False}
    assert source.checkpoint.facts["framing"] == kept

    exported = tmp_path / "export"
    export_run(source, exported)
    # Any program: its tokenizer, its configuration, generation without a prompt.
    tokenizer = AutoTokenizer.from_pretrained(exported)
    plain = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert tokenizer("one two")["input_ids"] == [*opening, *plain]
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    named = (model.config.bos_token_id, model.generation_config.bos_token_id)
    assert named == ((bos, bos) if opening else (None, None))
    card = (exported / "README.md").read_text()
    assert ("each text begins with <s>" if opening else "texts begin without BOS") in card

    checkpoint = import_model(exported, tmp_path / "imported")
    for where in (runs / f"run_{choice}", exported, checkpoint):
        facts = look_at(str(where))
        assert (list(facts.framing.opening), facts.framing.eod) == (opening, EOS)
        loaded = load_model(str(where))
        assert loaded.framing == facts.framing
        for own in (facts.tokenizer, loaded.tokenizer):
            assert own("one two")["input_ids"] == [*opening, *plain]


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_a_prompt_begins_as_a_document(
    choice: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / f"run_{choice}"
    tokenizer = AutoTokenizer.from_pretrained(runs / "bos")
    count = len(tokenizer("one two", add_special_tokens=False)["input_ids"])
    # One that spells the BOS out has it once.
    for prompt, more in (("one two", choice == "auto"), ("<s>one two", True)):
        assert load_tool("generate")([str(run), "--prompt", prompt, "--max-new-tokens", "1"]) == 0
        shown = capsys.readouterr().err
        found = re.search(r"^(\d+) prompt tokens", shown, re.MULTILINE)
        assert found is not None
        assert int(found[1]) == count + more
    assert ("each text begins with <s>" in shown) == (choice == "auto")


def test_a_checkpoint_made_before_it_was_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_run(runs / "run_auto")
    monkeypatch.delitem(source.checkpoint.facts, "framing")
    assert source.framing.opening == ()
    assert source.framing.eod == EOS
    assert "made before this was recorded" in source.framing.assumed
    # Another's model was never ours to train without it.
    monkeypatch.setitem(source.checkpoint.facts, "imported_from", "LlamaForCausalLM")
    assert source.framing == Framing((bos_of(runs),), EOS)


def test_weights_that_begin_with_other_data_are_told(runs: Path) -> None:
    facts = open_run(runs / "run_auto").checkpoint.facts
    bos = bos_of(runs)
    told = other_framing(facts, Framing((), EOS), Path("there"))
    assert told is not None
    assert f"weights of there have seen documents that begin with the tokens [{bos}]" in told
    for framing in (Framing((bos,), EOS), None):
        assert other_framing(facts, framing, Path("there")) is None
    assert other_framing({}, Framing((), EOS), Path("there")) is None


def test_an_imported_model_follows_its_tokenizer(tmp_path: Path, tokenizer_dir: Path) -> None:
    for template, begins in (("<s> $A", True), ("", False)):
        folder = tmp_path / f"hf_{begins}"
        save_model("llama", folder, tokenizer_dir)
        # One of its own ids, since the model has no rows to spare.
        bos = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("a")
        spell_with(folder, "a", bos, template)
        checkpoint = import_model(folder, tmp_path / f"ours_{begins}")
        facts = look_at(str(checkpoint))
        assert facts.framing.opening == ((bos,) if begins else ())
        assert facts.framing == look_at(str(folder)).framing
        assert not facts.framing.assumed


def spell_with(folder: Path, token: str, index: int, template: str) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template.replace("<s>", token), special_tokens=[(token, index)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
