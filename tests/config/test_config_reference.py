"""The tables of keys and the JSON Schema say what the schema says, and are right about conf/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from mone_megatron.config import Config
from mone_megatron.config.convert import flatten
from mone_megatron.config.group import Group
from mone_megatron.config.load import CONF_DIR, compose, to_yaml
from mone_megatron.config.marks import AtLeast
from mone_megatron.config.reference import BEGIN, END, fields, json_schema, write_tables

ROOT = CONF_DIR.parent
SCHEMA: dict[str, Any] = json.loads(json_schema())
EXPERIMENTS = sorted((CONF_DIR / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    path
    for folder in CONF_DIR.iterdir()
    if folder.name in SCHEMA["$defs"]
    for path in folder.glob("*.yaml")
)


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "config_reference.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _problems(data: Any, schema: dict[str, Any] = SCHEMA) -> list[str]:
    found = Draft202012Validator(schema | {"$defs": SCHEMA["$defs"]}).iter_errors(data)
    return [f"{error.json_path}: {error.message}" for error in found]


def _read(path: Path) -> dict[str, Any]:
    # By OmegaConf, which reads 1e-3 as a number, as editors do and PyYAML does not.
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def test_the_documentation_says_what_the_schema_says() -> None:
    checked = _tool("--check")
    assert checked.returncode == 0, checked.stderr


def test_what_is_old_is_told_and_written_again(tmp_path: Path) -> None:
    for name in ("configuration.md", "config.schema.json"):
        shutil.copy(ROOT / "docs" / name, tmp_path)
    page = tmp_path / "configuration.md"
    right = page.read_text(encoding="utf-8")
    page.write_text(right.replace("| `train.steps` | `100` |", "| `train.steps` | `99` |"))
    told = _tool("--check", "--docs", str(tmp_path))
    assert told.returncode == 2
    assert "configuration.md: not what the schema says; run python tools/" in told.stderr
    assert _tool("--docs", str(tmp_path)).returncode == 0
    assert page.read_text(encoding="utf-8") == right
    (tmp_path / "config.schema.json").unlink()
    assert _tool("--check", "--docs", str(tmp_path)).returncode == 2


def test_each_key_has_a_sentence_and_its_bounds() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", write_tables(BEGIN + END), re.M))
    assert rows.keys() >= flatten(Config()).keys()
    for key, rest in rows.items():
        sentence = rest.split(" | ")[-1]
        assert re.fullmatch(r".{10,}[.)]", sentence), (key, sentence)
    for key, bounds in {
        "model.num_layers": "integer, 1 or more",
        "optim.lr": "number, above 0",
        "optim.beta1": "number, from 0 up to, not including, 1",
        "mone.keep_ratio": "number, above 0, up to 1",
        "run.dir": "text, not empty",
        "model.router.balance": "list of `none`, `aux_loss`",
        "mone.score": "a file of `methods/scores`",
        "train.hooks": "list of files of `methods/hooks`",
        "model.router.options.top_p": "number, above 0, up to 1 | Of `top_p`. The share",
        "model.router.options.rank": "integer, 0 or more | Of `autonomy`, `cosine`,",
        "model.router.options.scale": "number, above 0 | Of `deco`.",
        "mone.rule_options.m": "integer | Of `n_of_m`.",
    }.items():
        assert f"| {bounds}" in rows[key], (key, rows[key])


@dataclass(frozen=True)
class _Undocumented(Group):
    told: Annotated[int, AtLeast(0)] = 0
    """A field that is documented."""
    untold: int = 0


def test_a_field_without_a_sentence_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"_Undocumented\.untold: not documented; write a sent"):
        list(fields(_Undocumented))
    with pytest.raises(ValueError, match="no place for the keys"):
        write_tables("# A page\n")


def test_the_json_schema_takes_what_is_shipped() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert _problems(json.loads(json.dumps(asdict(Config())))) == []
    saved = yaml.safe_load(to_yaml(compose(["experiment=tiny_mone"])))
    assert _problems(saved) == []
    for path in EXPERIMENTS:
        assert _problems(_read(path)) == [], path
    for path in OPTIONS:
        content = _read(path)
        content.pop("defaults", None)
        assert _problems(content, {"$ref": f"#/$defs/{path.parent.name}"}) == [], path


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("train: {steps: 0}", "$.train.steps"),
        ("train: {stepz: 1}", "$.train"),
        ("optim: {beta1: 1.0}", "$.optim.beta1"),
        ("mone: {keep_ratio: 0}", "$.mone.keep_ratio"),
        ("mone: {enabled: 1}", "$.mone.enabled"),
        ("device: {kind: gpu}", "$.device.kind"),
        ("data: {split: [1.0]}", "$.data.split"),
        ("run: {name: ' '}", "$.run.name"),
        ("trian: {}", "$"),
        ("model: {router: {options: {top_p: 1.5}}}", "$.model.router.options.top_p"),
        ("model: {router: {options: {rank: -1}}}", "$.model.router.options.rank"),
        ("model: {router: {options: {threshold: 0}}}", "$.model.router.options.threshold"),
        ("mone: {rule_options: {m: four}}", "$.mone.rule_options.m"),
        ("mone: {rule_options: {rate: fast}}", "$.mone.rule_options.rate"),
        ("mone: {rule_options: {theirs: [1]}}", "$.mone.rule_options"),
    ],
)
def test_the_json_schema_refuses(content: str, where: str) -> None:
    found = _problems(yaml.safe_load(content))
    assert [problem.split(": ")[0] for problem in found] == [where]


def test_the_json_schema_takes_an_interpolation() -> None:
    assert _problems(yaml.safe_load("model: {shared_expert_ffn_hidden_size: '${model.x}'}")) == []
