"""Every key of a group goes with every option of it, alone and with experiments and ablations."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import hydra
import pytest

from mone_megatron.config import Config
from mone_megatron.config.convert import flatten, keys, open_sections, sections
from mone_megatron.config.load import (
    CONF_DIR,
    CONFIG_NAME,
    check_overrides,
    compose,
    from_dictconfig,
)

ROOT = CONF_DIR.parent
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF_DIR.iterdir())
    if folder.is_dir()
}
EXPERIMENTS, ABLATIONS = GROUPS["experiment"], GROUPS["ablation"]
# Those that hold the keys of a section of the schema; an experiment or ablation sets any key.
SECTIONS = {field.name for field in dataclasses.fields(Config)} & GROUPS.keys()
OPTIONS = [f"{group}={option}" for group in sorted(SECTIONS) for option in GROUPS[group]]


def each_key(config: Config, *groups: str) -> list[str]:
    """An override of every key of the groups, by the value that it has."""
    overrides = []
    for key in keys(Config):
        if key.split(".")[0] in groups:
            value: object = config
            for name in key.split("."):
                value = getattr(value, name)
            overrides.append(f"{key}={json.dumps(value)}")
    return overrides


def test_the_groups_are_those_of_the_schema() -> None:
    assert GROUPS.keys() == SECTIONS | {"experiment", "ablation"}
    assert {field.name for field in dataclasses.fields(Config)} == SECTIONS | {"run"}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_goes_with_every_key_of_its_group(option: str) -> None:
    group = option.split("=")[0]
    alone = compose([option])
    overrides = each_key(alone, group)
    assert len(overrides) == len(flatten(getattr(alone, group)))
    assert compose([option, *overrides]) == alone


@pytest.mark.parametrize("number", range(len(EXPERIMENTS)), ids=EXPERIMENTS)
def test_an_experiment_goes_with_other_options_and_every_key(number: int) -> None:
    # Another option of every group for each experiment: all of them, between the experiments.
    chosen = [f"{group}={GROUPS[group][number % len(GROUPS[group])]}" for group in sorted(SECTIONS)]
    experiment = f"experiment={EXPERIMENTS[number]}"
    config = compose([experiment, *each_key(Config(), *SECTIONS, "run"), *chosen])
    assert config == Config()


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("experiment", ["tiny_mone", "moe_2.8b"])
def test_an_ablation_goes_with_other_options_and_every_key(ablation: str, experiment: str) -> None:
    overrides = [
        f"ablation={ablation}",
        f"experiment={experiment}",
        *(f"{group}={GROUPS[group][0]}" for group in sorted(SECTIONS)),
        *each_key(Config(), *SECTIONS, "run"),
    ]
    assert check_overrides(overrides, multirun=True) == []
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        assert from_dictconfig(hydra.compose(CONFIG_NAME, overrides)) == Config()


def test_a_begun_run_that_saves_is_one_command() -> None:
    documented = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    command = "checkpoint=auto checkpoint.initialize=runs/tiny_moe/checkpoints/step_00000100"
    assert command in documented
    config = compose(["experiment=tiny_mone", *command.split()])
    assert config.checkpoint.initialize == "runs/tiny_moe/checkpoints/step_00000100"
    assert (config.checkpoint.resume, config.checkpoint.interval) == ("auto", 500)


PAGES = sorted(
    [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.sh")]
)
# Files and Python names that look like keys.
_FILES = re.compile(r"\.(py|json|jsonl|html|yaml|md|sh|safetensors|bin|idx|sbatch|run|txt|png)$")
# Python of the examples, and mistakes that pages show the answer to.
_NO_KEYS = {
    "checkpoint.damage",
    "checkpoint.path",
    "model.set_experts_implementation",
    "mone.keep_ratoi",
    "run.alert",
    "train.stepz",
}
_KEY = re.compile(
    r"(?<![\w./{-])(" + "|".join(sorted(SECTIONS | {"run"})) + r")((?:\.[a-z_][a-z0-9_]*)+)(?=\W|$)"
)
_OPTION = re.compile(r"(?<![\w.-])(" + "|".join(sorted(GROUPS)) + r")=([a-z][\w.]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_name_keys_and_options_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {*keys(Config), *sections(Config)}
    named = {match[0] for match in _KEY.finditer(text)}
    # megatron-core's modules begin like the group of its settings.
    named = {key for key in named if not key.startswith("megatron.core.")}
    # An open section's keys are its rule's own.
    named = {key for key in named if key.rpartition(".")[0] not in {*open_sections(Config)}}
    assert [key for key in sorted(named - known - _NO_KEYS) if not _FILES.search(key)] == []
    options = {(group, name.rstrip(".")) for group, name in _OPTION.findall(text)}
    # A tutorial's own files.
    written = {*re.findall(r"^# conf/(\w+)/([\w.]+)\.yaml$", text, re.MULTILINE)}
    assert [option for option in options - written if option[1] not in GROUPS[option[0]]] == []
