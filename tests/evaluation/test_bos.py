"""Models whose texts begin with a BOS: each window, question and text of a task does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from evaluation_helpers import MAX_LENGTH, TEXT
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from mone_megatron.data.documents import InputSettings
from mone_megatron.data.framing import Framing
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.evaluation.corpora import Reader, open_corpus
from mone_megatron.evaluation.evaluate import harness_model
from mone_megatron.evaluation.harness_tokens import fitted, rolling_windows
from mone_megatron.evaluation.models import look_at
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.evaluation.scored_lm import ScoredLM, Scores
from mone_megatron.lab.routing.texts import Text
from mone_megatron.testing.tokenizers import with_bos
from mone_megatron.testing.tools import load_tool

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers whose tokenizer's template begins texts with a BOS."""
    place = tmp_path_factory.mktemp("bos")
    save_tokenizer(train_tokenizer([TEXT], 500), place / "plain")
    bos = with_bos(place / "plain", place / "model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=bos + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2, bos_token_id=bos, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Of each token but the first, float32 ``[len(ids) - 1]``."""
    tokens = torch.tensor([list(ids)])
    logits = model(input_ids=tokens[:, :-1]).logits[0]
    return -F.cross_entropy(logits, tokens[0, 1:], reduction="none")


def test_the_figure_is_that_of_windows_which_begin_with_it(
    folder: Path, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:3000], encoding="utf-8")
    file = tmp_path / "out.json"
    arguments = [folder, "--perplexity", tmp_path / "text.txt", "--seq-length", LENGTH]
    assert load_tool("eval_hf")([str(each) for each in (*arguments, "--json", file)]) == 0
    shown = capsys.readouterr()
    facts = look_at(str(folder))
    (bos,) = facts.framing.opening
    ids = [*facts.tokenizer.encode(TEXT[:3000], add_special_tokens=False), 0]
    total = sum(
        float(log_likelihoods(model, [bos, *ids[start : start + LENGTH]]).sum())
        for start in range(0, len(ids), LENGTH)
    )
    (result,) = json.loads(file.read_text())["models"]
    loss = next(score["value"] for score in result["scores"] if score["metric"] == "loss")
    assert result["corpora"][0]["tokens"] == len(ids)
    assert loss == pytest.approx(-total / len(ids), abs=1e-4)
    assert "each text begins with <s>" in shown.out
    assert (result["opening"], result["texts"]) == ([bos], "each text begins with <s>")


@pytest.mark.parametrize("length", [1, 2, 5, 1000])
def test_every_window_begins_with_it_and_every_token_is_predicted(
    length: int, folder: Path, tmp_path: Path
) -> None:
    texts = ["one two three", " ", "four", "", "five six"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    facts = look_at(str(folder))
    reader = Reader(facts.tokenizer, facts.vocab_size, length, facts.framing)
    windows = [window.tolist() for window in open_corpus(str(path)).windows(reader)]
    (bos,) = facts.framing.opening
    assert all(window[0] == bos and 2 <= len(window) <= length + 1 for window in windows)
    expected = []
    for text in ("one two three", "four", "five six"):
        expected += [*facts.tokenizer.encode(text, add_special_tokens=False), 0]
    predicted = [token for window in windows for token in window[1:]]
    assert [token for token in predicted if token != bos] == expected
    # The tokens of a corpus of it, and the domains of an analysis, are the same.
    preprocess_files([path], tmp_path / "corpus", TokenizerSettings(folder=folder))
    indexed = open_corpus(str(tmp_path / "corpus")).windows(reader)
    assert [window.tolist() for window in indexed] == windows
    domains = Text([str(path)], InputSettings(), "text").domains(reader, 1000)
    assert [window.tolist() for window in domains["four"]] == [
        [bos, *expected[i : i + length]]
        for expected in [[*facts.tokenizer.encode("four", add_special_tokens=False), 0]]
        for i in range(0, len(expected), length)
    ]


def test_tasks_begin_with_it_whoever_computes(folder: Path, model: PreTrainedModel) -> None:
    facts = look_at(str(folder))
    (bos,) = facts.framing.opening

    def score(requests: Sequence[ScoreRequest]) -> Scores:
        return [
            (float(log_likelihoods(model, one.tokens)[-one.scored :].sum()), False)
            for one in requests
        ]

    ours = ScoredLM(folder, max_length=MAX_LENGTH, score=score, framing=facts.framing)
    theirs = harness_model(model, facts, batch_size=4, quiet=True)

    def asked(kind: str, *arguments: str) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    def encode(text: str) -> list[int]:
        return list(facts.tokenizer.encode(text, add_special_tokens=False))

    long, ending = TEXT[:900], "the end"
    pairs = [("import os", " and sys"), ("", "import os"), (long, ending)]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    expected = []
    for context, wanted in pairs:
        whole = encode(context + wanted)
        scored = len(whole) - len(encode(context))
        read = [bos, *whole[-MAX_LENGTH:]]
        expected.append(float(log_likelihoods(model, read)[-scored:].sum()))
    for lm in (ours, theirs):
        found = [value for value, _ in lm.loglikelihood(requests)]
        assert found == pytest.approx(expected, abs=1e-3)

    ids = encode(long)
    assert len(ids) > 2 * MAX_LENGTH
    total = sum(
        float(log_likelihoods(model, [bos, *ids[start : start + MAX_LENGTH]]).sum())
        for start in range(0, len(ids), MAX_LENGTH)
    )
    short = float(log_likelihoods(model, [bos, *encode(ending)]).sum())
    texts = [asked("loglikelihood_rolling", text) for text in (long, ending)]
    for lm in (ours, theirs):
        assert lm.loglikelihood_rolling(texts) == pytest.approx([total, short], abs=1e-2)


def test_prompts_that_are_too_long_keep_it(folder: Path, model: PreTrainedModel) -> None:
    facts = look_at(str(folder))
    (bos,) = facts.framing.opening
    lm = harness_model(model, facts, batch_size=4)
    ids, mask = lm.tok_batch_encode([TEXT[:900], "one two"], left_truncate_len=40)
    assert ids.shape == (2, 40)
    assert ids[0].tolist() == [bos, *facts.tokenizer(TEXT[:900])["input_ids"][-39:]]
    short = facts.tokenizer("one two")["input_ids"]
    assert ids[1][mask[1].bool()].tolist() == short
    assert short[0] == bos


def test_tokens_made_otherwise_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    facts = look_at(str(folder))
    reader = Reader(facts.tokenizer, facts.vocab_size, LENGTH, facts.framing)
    for choice in ("never", "auto"):
        prefix = tmp_path / choice
        settings = TokenizerSettings(folder=folder, bos=choice)  # type: ignore[arg-type]
        preprocess_files([tmp_path / "a.txt"], prefix, settings)
        told: list[str] = []
        windows = open_corpus(str(prefix)).windows(reader, told.append)
        assert windows[0][0] == facts.framing.opening[0]
        assert told == (
            [
                f"{prefix}: in these tokens texts begin without BOS, and for the model each text "
                "begins with <s>"
            ]
            if choice == "never"
            else []
        )


def test_requests_that_are_too_long_keep_it() -> None:
    framing = Framing((9, 8), 0)
    assert fitted([9, 8, 1, 2, 3], [4, 5], framing, 4) == ([9, 8, 3], [4, 5])
    assert fitted([9, 8, 1], [4, 5], framing, 4) == ([9, 8, 1], [4, 5])
    # A context without it, as of chat templates of their own, is as in the harness.
    assert fitted([1, 2, 3, 6], [4, 5], framing, 4) == ([2, 3, 6], [4, 5])
    assert fitted([9, 8, 1, 2], [3, 4, 5, 6], framing, 4) == ([9, 8], [4, 5, 6])
    assert fitted([1, 2, 3], [4], Framing((), 0), 2) == ([2, 3], [4])
    assert rolling_windows([9, 8, 1, 2, 3], (9, 8), 3) == [([9, 8], [1, 2]), ([9, 8], [3])]
    assert rolling_windows([1, 2, 3], (9,), 1) == [([9], [1]), ([9], [2]), ([9], [3])]


def test_exports_say_it_themselves(folder: Path, tmp_path: Path) -> None:
    """An export's recipe counts, old ones without the field were made without BOS."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    recipe = tmp_path / "training_config.yaml"
    recipe.write_text("model: {}\n")
    facts = look_at(str(tmp_path))
    assert facts.framing.opening == ()
    assert facts.beginning.startswith("texts begin without BOS (made before")
    # Whoever asks the tokenizer gets the same.
    assert facts.tokenizer("one")["input_ids"] == facts.tokenizer.encode(
        "one", add_special_tokens=False
    )
    recipe.write_text(yaml.safe_dump({"framing": Framing((7,), 0).as_facts()}))
    assert look_at(str(tmp_path)).framing == Framing((7,), 0)
    assert look_at(str(tmp_path)).tokenizer("one")["input_ids"][0] == 7
    recipe.write_text("framing: {opening: 3}\n")
    with pytest.raises(ValueError, match=r"training_config.yaml is damaged"):
        look_at(str(tmp_path))
