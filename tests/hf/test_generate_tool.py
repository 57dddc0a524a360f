"""tools/generate.py, on an export-like folder."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_megatron.testing.tools import load_tool

PROMPTS = ["import os\n", "def f(x):"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return save_model("mixtral", tmp_path_factory.mktemp("generate") / "hf", tokenizer_dir)


def generate(*arguments: object) -> int:
    return load_tool("generate")([str(argument) for argument in arguments])


def expected(folder: Path, prompt: str, new_tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_and_speed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(folder, "--prompt", PROMPTS[0], "--max-new-tokens", 12) == 0
    shown = capsys.readouterr()
    assert shown.out == PROMPTS[0] + expected(folder, PROMPTS[0], 12) + "\n"
    assert re.search(
        r"\d+ prompt tokens in .* tokens/s\); \d+ more tokens in .*tokens/s", shown.err
    )


def test_a_batch_gives_what_each_prompt_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [prompt.strip() for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    assert generate(folder, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 12) == 0
    texts = [prompt + expected(folder, prompt, 12) for prompt in prompts]
    assert capsys.readouterr().out == f"--- 1\n{texts[0]}\n--- 2\n{texts[1]}\n"


def test_sampling_is_a_function_of_the_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for seed in (1, 1, 2):
        options = ["--temperature", 1.5, "--top-k", 50, "--seed", seed, "--max-new-tokens", 16]
        assert generate(folder, "--prompt", PROMPTS[1], *options) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = io.TextIOWrapper(io.BytesIO(f"{PROMPTS[1]}\n".encode()))
    monkeypatch.setattr("sys.stdin", given)
    assert generate(folder, "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.startswith(PROMPTS[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: 0 is not 1"),
        (["FOLDER", "--prompt", "x", "--max-new-tokens", "128"], "more than the 128 the model was"),
        (["FOLDER", "--prompt", "x", "--temperature", "-1"], "--temperature: -1 is not a number"),
        (["FOLDER", "--prompt", "x", "--temperature", "nan"], "--temperature: nan is not a number"),
        (["FOLDER", "--prompt", "x", "--temperature", "inf"], "--temperature: inf is not a number"),
        (["FOLDER", "--prompt", "x", "--device", "nowhere"], "--device: 'nowhere' is no device"),
        (["FOLDER", "--prompt", "x", "--device", "meta"], "torch cannot compute on meta"),
        (["FOLDER", "--prompt", "x", "--top-p", "0.5"], "need a --temperature above 0"),
        (["FOLDER", "--prompts", "nowhere.txt"], "--prompts: nowhere.txt cannot be read"),
        (["conf", "--prompt", "x"], "conf: is neither a run, a checkpoint nor a model"),
    ],
)
def test_bad_input_gets_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert generate(*(folder if text == "FOLDER" else text for text in arguments)) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_an_empty_prompt_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert generate(folder) == 2
    assert "error: prompt 1: is empty; give at least one token" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "import_hf", "sparsify_hf"])
@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "4294967296", "1" + 30 * "0"])
def test_a_seed_is_one_that_every_generator_takes(
    name: str, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_tool(name)(["model", f"--seed={seed}"])
    told = capsys.readouterr().err
    assert told.startswith(f"error: --seed: {seed!r} is not a whole number from 0 to 4294967295")


def test_the_clock_counts_to_the_end_of_each_text() -> None:
    from mone_megatron.hf.generation import _count

    new = torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 8, 9], [0, 0, 0, 0, 0]])
    assert _count(new, 0) == 3 + 5 + 1
    assert _count(new, [0, 9]) == 3 + 5 + 1
    assert _count(new, None) == 15
