"""Command lines and YAML files become typed configs, and mistakes become one line each."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mone_megatron.config import Config, ConfigError
from mone_megatron.config.convert import flatten, from_dict, keys
from mone_megatron.config.load import (
    CONF_DIR,
    check_overrides,
    compose,
    from_dictconfig,
    from_yaml,
    hydra_override,
    to_yaml,
)


def problems_of(overrides: list[str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_no_overrides_give_the_defaults_of_the_schema() -> None:
    assert compose([]) == Config()


def test_overrides_reach_the_typed_config() -> None:
    config = compose(
        ["experiment=tiny_mone", "train.steps=1e3", "optim.lr=1", "mone.apply_to=[routed,shared]"]
    )
    assert config.train.steps == 1000
    assert isinstance(config.train.steps, int)
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.mone.apply_to == ("routed", "shared")
    assert (config.run.name, config.run.dir) == ("tiny_mone", "runs/tiny_mone")


def test_a_group_may_be_given_as_a_dictionary() -> None:
    assert compose(["train={steps: 3}"]).train.steps == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.steps=3", "experiment=tiny_mone", "mone.score=wina", "train.steps=4"],
        ["mone.enabled=false", "experiment=quickstart_mone", "mone=half", "device=cpu"],
        ["run.name=second", "run.dir='runs/${run.name}/${train.seed}'", "train.seed=7"],
        ["model.router.balance=[none]", "model.router.balance_coeff=[0.0]", "mone.apply_to=[]"],
        ["mone.rule=mass", "++mone.rule_options.p=0.5", "mone.rule_options={p: 0.25}"],
        ["mone.rule=mass", "mone.rule_options.p=0.5", "experiment=tiny_mone"],
        ["train={steps: 3, seed: 5}", "train.seed=6"],
        ["+train.steps=3"],
        ["model=tiny", "model=quickstart"],
        ["run.name='a=b, c'", "data.paths=['a b', c]", "run.dir=null"],
        ["~experiment"],
        ["train.stepz=3"],
        ["train.steps.more=3"],
    ],
)
def test_what_is_composed_is_what_hydra_composes(overrides: list[str]) -> None:
    """Also where options that were composed before differ in values alone."""

    def told(composed: Callable[[], Config]) -> Config | tuple[str, ...]:
        try:
            return composed()
        except ConfigError as error:
            return error.problems
        except HydraException:
            return ()

    def ours() -> Config:
        return compose(overrides)

    def by_hydra() -> Config:
        with hydra.initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
            return from_dictconfig(
                hydra.compose("config", [hydra_override(text) for text in overrides])
            )

    first, second, expected = (told(each) for each in (ours, ours, by_hydra))
    assert first == second
    if isinstance(expected, Config):
        assert first == expected
    else:
        assert isinstance(first, tuple)


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    shutil.copytree(CONF_DIR, folder)
    assert compose(["experiment=tiny_moe", "train.seed=1"], folder).train.steps == 20
    experiment = folder / "experiment" / "tiny_moe.yaml"
    text = experiment.read_text(encoding="utf-8")
    experiment.write_text(text.replace("steps: 20", "steps: 21"), encoding="utf-8")
    assert compose(["experiment=tiny_moe", "train.seed=1"], folder).train.steps == 21
    assert compose(["experiment=tiny_moe"]).train.steps == 20


def test_what_is_composed_is_the_callers_own() -> None:
    compose(["train.steps=5"]).mone.rule_options["p"] = 0.5
    assert compose(["train.steps=5"]).mone.rule_options == {}


def test_run_dir_follows_the_name() -> None:
    assert compose(["experiment=tiny_moe", "run.name=second"]).run.dir == "runs/second"


@pytest.mark.parametrize(
    ("overrides", "key", "hint"),
    [
        (["train.stepz=3"], "train.stepz", "did you mean train.steps"),
        (["steps=3"], "steps", "did you mean train.steps?"),
        (["optim.seq_length=3"], "optim.seq_length", "did you mean train.seq_length?"),
        (["modle=tiny"], "modle", "did you mean model?"),
        (["++train.qqq=3"], "train.qqq", "keys of train: steps, seed"),
        (["zzz=3"], "zzz", "docs/configuration.md"),
        (["experiment=tiny_mon"], "experiment", "did you mean tiny_mone"),
        (["device=tpu"], "device", "options: auto, cpu, cuda"),
        (["experiment=null"], "experiment", "~experiment"),
        (["train.steps=[1,"], "train.steps", "quote special characters"),
        (["train.steps"], "train.steps", "write key=value"),
        (["train.steps=1,2"], "train.steps", "add -m"),
        (["train.steps=abc"], "train.steps", "expected an integer, got the text 'abc'"),
        (["train.steps=1.5"], "train.steps", "expected an integer, got 1.5"),
        (["train.steps=true"], "train.steps", "expected an integer, got true"),
        (["train.steps=inf"], "train.steps", "expected an integer"),
        (["train.steps=null"], "train.steps", "got null"),
        (["optim.lr=high"], "optim.lr", "expected a number, got the text 'high'"),
        (["optim.lr=nan"], "optim.lr", "expected a number"),
        (["optim.lr=true"], "optim.lr", "expected a number"),
        (["mone.enabled=1"], "mone.enabled", "write true or false"),
        (["run.name=3"], "run.name", "put it in quotes"),
        (["device.kind=cud"], "device.kind", "did you mean cuda"),
        (["mone.score=top"], "mone.score", "abs_activation, abs_gate"),
        (["data.paths=a"], "data.paths", "write [a]"),
        (["data.weights=[1,x]"], "data.weights", "expected a number"),
        (["data.split=[1,0]"], "data.split", "expected 3 values, got 2"),
        (["model.router=3"], "model.router", "expected a section"),
        (["run.name=${nope}"], "run.name", "nope"),
        (["run.name=???"], "run.name", "Missing mandatory value"),
        (["+model._target_=os.system"], "model._target_", "nothing is instantiated"),
        (["+train.steps=3"], "config", "train.steps"),
    ],
)
def test_mistakes_are_one_line_with_the_key_and_a_hint(
    overrides: list[str], key: str, hint: str
) -> None:
    (problem,) = problems_of(overrides)
    assert problem.startswith(f"{key}: ")
    assert hint in problem


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("mone=glob(*)", None),
        ("mone=glob(quarter*)", None),
        ("mone=glob(nothing*)", "mone: no option is like glob(nothing*)"),
        ("mone.keep_ratio=glob(*)", "mone.keep_ratio: glob(*) is not a list of values"),
        ("mone.keep_ratio=interval(0,1)", "mone.keep_ratio: interval(0,1) is not a list of values"),
    ],
)
def test_what_hydra_sweeps_over(override: str, told: str | None) -> None:
    problems = check_overrides(["experiment=tiny_mone", override], multirun=True)
    assert [problem.split(";")[0] for problem in problems] == ([told] if told else [])


def test_all_mistakes_are_reported_at_once() -> None:
    assert len(problems_of(["stepz=1", "modle=tiny", "device=tpu"])) == 3
    assert len(problems_of(["train.steps=x", "optim.lr=y", "device.kind=z"])) == 3


def test_keys_of_ours_are_no_secrets() -> None:
    assert compose(["model.experts_per_token=1", "data.tokenizer=t"]).model.experts_per_token == 1


@pytest.mark.parametrize(
    "override",
    ["+logging.wandb.api_key=hunter2", "logging.wandb.token=[hunter2", "++data.password=hunter2"],
)
def test_secrets_are_refused_and_never_shown(override: str) -> None:
    (problem,) = problems_of([override])
    assert "secrets do not belong" in problem
    assert "hunter2" not in problem


def test_sweeps_pass_with_multirun() -> None:
    assert check_overrides(["train.steps=1,2", "device=cpu,cuda"], multirun=True) == []
    (problem,) = check_overrides(["device=cpu,tpu"], multirun=True)
    assert "no option 'tpu'" in problem


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        compose([], tmp_path)


def test_mistakes_in_yaml_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {stepz: 3}\nmodel: {_target_: os.system}\n")
    with pytest.raises(ConfigError) as caught:
        compose([], tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "train.stepz",
        "model._target_",
    ]


def test_a_missing_default_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [{model: smal}]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("num_layers: 2\n")
    with pytest.raises(ConfigError, match="model: no option 'smal'; did you mean small"):
        compose([], tmp_path)


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: [\n")
    with pytest.raises(ConfigError) as caught:
        compose([], tmp_path)
    assert len(caught.value.problems) == 1


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = compose(["experiment=quickstart_mone", "data.tokenizer='1e3'", "optim.eps=1e-12"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(-(2**53), 2**53),
    name=st.text(st.characters(codec="ascii", exclude_characters="$\\?")),
)
def test_any_value_survives_yaml(
    lr: float, steps: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = from_dict(
        Config, {"optim": {"lr": lr}, "train": {"steps": steps}, "run": {"name": name}}
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config
    assert to_yaml(config) == OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1\n", "got a list"), ("a: [\n", "not valid YAML"), ("train: {stepz: 1}\n", "train.stepz")],
)
def test_from_yaml_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "saved.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        from_yaml(path)
    assert str(path) in caught.value.problems[0]


def test_from_yaml_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        from_yaml(tmp_path / "none.yaml")


def test_flatten_has_every_key_and_only_scalars() -> None:
    flat = flatten(Config())
    assert list(flat) == list(keys(Config))
    assert all(isinstance(value, (str, int, float, bool)) for value in flat.values())
    assert flat["data.split"] == "0.95,0.05,0.0"
    assert flat["model.router.balance"] == "aux_loss"


def test_the_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix[:-1]]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def test_the_first_option_of_each_group_spells_out_every_key() -> None:
    """So `key=value` works for all of them, without Hydra's `+`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        tree = OmegaConf.to_container(hydra_compose("config"))
    assert set(_leaves(tree)) == set(keys(Config))
