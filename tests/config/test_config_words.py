"""What is wrong with a value is told in the user's own words, not in what they were read as."""

from __future__ import annotations

from pathlib import Path

import pytest

from mone_megatron import pretrain
from mone_megatron.commands import train
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose, from_yaml
from mone_megatron.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("run.name=1e-3", "expected text, got 1e-3; put it in quotes: '\"1e-3\"'"),
        ("run.name=1_000", "expected text, got 1_000; put it in quotes: '\"1_000\"'"),
        ("run.name=1.50", "expected text, got 1.50; put it in quotes: '\"1.50\"'"),
        ("run.name=True", "expected text, got True; put it in quotes: '\"True\"'"),
        ("run.name=[a,b]", "expected text, got [a,b]; put it in quotes: '\"[a,b]\"'"),
        ("run.name=null", "expected text, got null; put it in quotes: '\"null\"'"),
        ("train.steps=yes", "expected an integer, got the text 'yes'; write one such as 4"),
        ("train.steps=", "expected an integer, got the text ''; write one such as 4"),
        ("train.steps=1e-3", "expected an integer, got 1e-3; write one such as 4"),
        ("train.steps='10'", "expected an integer, got the text '10'; write one such as 4"),
        ("mone.enabled=0x1", "expected true or false, got the text '0x1'; write true or false"),
        ("optim.lr=[1e-3]", "expected a number, got [1e-3]; write one such as 0.1"),
        ("data.weights=1e-3", "expected a list, got 1e-3; write [1e-3]"),
        ("data.paths=[1_0,b]", "expected text, got 1_0; put it in quotes: '\"1_0\"'"),
        ("++data.paths=[a, 1e-3]", "expected text, got 1e-3; put it in quotes: '\"1e-3\"'"),
        ("device.kind=1e3", "1e3 is not one of auto, cuda, cpu; choose one of them"),
        ("model=0x10", "no option '0x10'; choose one of them (options: "),
        ("experiment=1e-3", "no option '1e-3'; choose one of them (options: "),
    ],
)
def test_of_the_command_line(override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([override])
    (line,) = refused.value.problems
    key = override.partition("=")[0].lstrip("+")
    assert line.startswith(f"{key}: {problem}")


def test_what_is_suggested_works() -> None:
    for written in ("1e-3", "0x10", "1_000", "007", "[a,b]", "null", "true"):
        assert compose([f'run.name="{written}"']).run.name == written


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lr=-1e-3", "optim.lr: -1e-3 is not positive; use a number above 0"),
        ("optim.beta1=1.50", "optim.beta1: 1.50 is outside [0, 1); use a number from 0 up to,"),
        ("train.steps=-1e3", "train.steps: -1e3 is too small; use 1 or more"),
        ("train.seed=3_000_000_000", "train.seed: 3_000_000_000 is too large; use 2147483647"),
        ("++mone.keep_ratio=2e0", "mone.keep_ratio: 2e0 is outside (0, 1]; use a share such as"),
    ],
)
def test_of_a_number_out_of_bounds(
    override: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        lambda given: pretrain.main(given),
        lambda given: pretrain.main([*given, "--dry-run"]),
        lambda given: train.main([*given, "--processes", "2"]),
    ):
        assert command(["experiment=tiny_moe", override]) == 2
        assert f"error: {problem}" in capsys.readouterr().err


def test_a_number_from_elsewhere_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["experiment=tiny_moe", "optim.lr=-2e-3", "optim.eps=${optim.lr}"]) == 2
    told = capsys.readouterr().err
    assert "optim.lr: -2e-3 is not positive" in told
    assert "optim.eps: -0.002 is not positive" in told


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("run:\n  name: 1e-3\n", "run.name: expected text, got 1e-3; put it in quotes"),
        ("run: {name: 0x10}\n", "run.name: expected text, got 0x10; put it in quotes"),
        ("train:\n  steps: 1.50\n", "train.steps: expected an integer, got 1.50;"),
        ("data: {paths: [a, 0x10]}\n", "data.paths: expected text, got 0x10; put it"),
        ("mone: 0x10\n", "mone: expected a section with keys, got 0x10; write mone.KEY"),
    ],
)
def test_of_a_file(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        from_yaml(path)
    assert str(refused.value).startswith(f"{path}: {problem}")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"run: {name: \xff\xfe}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: not text in UTF-8 .*; give a config"):
        from_yaml(path)


def test_a_tokenizer_in_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = Path(f"{tmp_path}/tok\udcff")
    save_tokenizer(train_tokenizer(["a b"], 257), folder)
    assert load_tokenizer(folder).vocab_size == 257
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        load_tokenizer(folder)
