"""A setting that nothing reads is refused, or told before the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mone_megatron.config import Config, ConfigError, validate
from mone_megatron.config.group import Group
from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.config.marks import NameIn
from mone_megatron.config.reference import fields
from mone_megatron.config.without_effect import unread_keys, without_effect
from mone_megatron.testing.warm_start import run_python

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
MLA = ("model.attention=mla", "model.num_query_groups=4", "model.qk_norm=false")
UNBALANCED = ("model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
DENSE = ("model.num_experts=0",)


def lines(*overrides: str) -> list[str]:
    return without_effect(compose(overrides), [given.split("=")[0] for given in overrides])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("mone.rule=mass", "mone.density.step=alpha"),
         "mone.enabled=false: mone.rule=mass, mone.density.step=alpha"),
        (("mone.enabled=true", "mone.keep_ratio_start=0.5"),
         "mone.keep_ratio_schedule=constant: mone.keep_ratio_start=0.5"),
        (("mone.enabled=true", "mone.keep_ratio=1", "mone.score=abs_gate",
          "mone.balance.coeff=0.1", "mone.memory=packed"),
         "mone.keep_ratio=1, which keeps all neurons: mone.score=abs_gate, mone.memory=packed, "
         "mone.balance.coeff=0.1"),
        (("mone.enabled=true", "mone.rule=nonzero", "model.activation=relu",
          "mone.straight_through=true"),
         "mone.rule=nonzero, whose other neurons are 0 and have no gradients: "
         "mone.straight_through=true"),
        (("model.num_experts=0", "model.router.z_loss_coeff=0.1", "model.experts_per_token=4",
          "parallel.dispatcher=allgather"),
         "model.num_experts=0: model.experts_per_token=4, model.router.z_loss_coeff=0.1, "
         "parallel.dispatcher=allgather"),
        (("model.dense_ffn_hidden_size=64",),
         "model.first_dense_layers=0: model.dense_ffn_hidden_size=64"),
        (("model.mla.kv_lora_rank=64",), "model.attention=gqa: model.mla.kv_lora_rank=64"),
        (("model.product_key.keys=8",), "model.experts=grouped: model.product_key.keys=8"),
        (("model.mtp.coeff=0.3",), "model.mtp.depth=0: model.mtp.coeff=0.3"),
        (("model.rope_scaling.factor=4",),
         "model.rope_scaling.type=none: model.rope_scaling.factor=4.0"),
        (("model.router.expert_bias_rate=0.1",),
         "model.router.expert_bias=false: model.router.expert_bias_rate=0.1"),
        (("model.router.score_function=sigmoid", "model.router.pre_softmax=true"),
         "model.router.score_function=sigmoid: model.router.pre_softmax=true"),
        (("model.router.balance=[sinkhorn]", "model.router.balance_coeff=[0.0]",
          "model.router.pre_softmax=true", "model.router.scaling_factor=2"),
         "model.router.balance=[sinkhorn]: model.router.pre_softmax=true, "
         "model.router.scaling_factor=2.0"),
        (("data=indexed", "data.paths=[a]", "data.max_megabytes=3", "data.vocab_size=300"),
         "data.source=indexed: data.vocab_size=300, data.max_megabytes=3.0"),
        (("data.tokenizer=there", "data.vocab_size=300"),
         "data.tokenizer=there: data.vocab_size=300"),
        (("train.eval_steps=2",), "train.eval_interval=0: train.eval_steps=2"),
        (("train.eval_tasks_limit=2",), "no train.eval_tasks: train.eval_tasks_limit=2"),
        (("train.on_bad_loss=skip", "train.max_rollbacks=1"),
         "train.on_bad_loss=skip: train.max_rollbacks=1"),
        (("checkpoint.keep_last=3", "checkpoint.async_save=true"),
         "checkpoint.interval=0: checkpoint.async_save=true, checkpoint.keep_last=3"),
        (("optim.schedule=constant", "optim.min_lr=1e-5", "optim.decay_fraction=0.2"),
         "optim.schedule=constant: optim.min_lr=1e-05, optim.decay_fraction=0.2"),
        (("logging.wandb.mode=disabled", "logging.wandb.tags=[a,b]"),
         "logging.wandb.mode=disabled: logging.wandb.tags=[a,b]"),
        (("logging.alerts.dead_neurons=0.1",),
         "mone.enabled=false: logging.alerts.dead_neurons=0.1"),
        (("logging.layer_interval=0", "logging.alerts.patience=2"),
         "logging.layer_interval=0: logging.alerts.patience=2"),
        (("device.kind=cuda", "device.threads=2"), "device.kind=cuda: device.threads=2"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(overrides: tuple[str, ...], line: str) -> None:
    assert lines(*overrides) == [f"no effect with {line}"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_experiments_tell_nothing(experiment: str) -> None:
    for overrides in ((), ("logging.wandb.mode=disabled",)):
        assert without_effect(compose([f"experiment={experiment}", *overrides])) == []


def test_what_an_experiment_sets_for_what_is_switched_off_is_not_told() -> None:
    coefficient = "mone.balance.coeff=0.01"
    assert lines("experiment=tiny_mone", "mone.enabled=false") == []
    assert lines("experiment=tiny_mone", "mone.keep_ratio=1") == []
    assert lines("experiment=tiny_mone", "data=indexed", "data.paths=[a]") == []
    assert lines("experiment=tiny_mone", "mone.enabled=false", coefficient) == [
        f"no effect with mone.enabled=false: {coefficient}"
    ]
    # Nobody wrote that neurons are not selected: an experiment forgot to.
    assert without_effect(compose(["experiment=tiny_moe", coefficient])) == [
        f"no effect with mone.enabled=false: {coefficient}"
    ]


def test_a_size_of_another_variant_is_told_of_who_sets_it() -> None:
    """What experiments and shapes set for all of their variants is told of a command line alone."""
    dense = ("experiment=tiny_moe", "model.num_experts=0", "model.router.z_loss_coeff=0")
    assert without_effect(compose(dense)) == []
    assert lines(*dense, "model.expert_ffn_hidden_size=32") == [
        "no effect with model.num_experts=0: model.expert_ffn_hidden_size=32"
    ]


def test_a_run_tells_it_and_so_does_a_dry_run(tmp_path: Path) -> None:
    overrides = (
        "experiment=tiny_moe", "device=cpu", "data.max_megabytes=0.2", "mone.score=abs_gate",
        "train.steps=1", "logging.wandb.mode=disabled", f"run.dir={tmp_path}/run",
    )  # fmt: skip
    line = "no effect with mone.enabled=false: mone.score=abs_gate\n"
    for flags in (("--dry-run",), ()):
        done = run_python(
            ["-m", "mone_megatron.pretrain", *overrides, *flags], folder=tmp_path, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count(line) == 1


# Two steps each of what a run can do without; between them nothing is left unread without a reason.
QUIET = (
    "device=cpu", "device.threads=1", "data.max_megabytes=0.2", "train.steps=2",
    "train.global_batch_size=4", "model.num_layers=2", "logging.progress=none",
    "logging.wandb.mode=disabled", "logging.report=false",
)  # fmt: skip
RUNS = {
    "moe": ("experiment=tiny_moe", "checkpoint.interval=1"),
    "mone": (
        "experiment=tiny_mone", "train.eval_interval=1", "data.split=[0.8,0.2,0.0]",
        "optim.schedule=constant",
    ),
    "dense": ("experiment=tiny_moe", *DENSE),
    "product_key": ("experiment=tiny_moe", *DENSE, "model.experts=product_key"),
    "mla": ("experiment=tiny_moe", *MLA),
    "mass": (
        "experiment=tiny_mone", "mone.rule=mass", "mone.density.steers=p",
        "mone.density.step=alpha",
    ),
    "nonzero": ("experiment=tiny_mone", "mone.rule=nonzero", "model.activation=relu"),
    "all": ("experiment=tiny_mone", "mone.keep_ratio=1"),
    "relu": ("experiment=tiny_moe", "model.router.kind=relu", *UNBALANCED),
    "fixed": (
        "experiment=tiny_moe", "model.router.kind=relu", *UNBALANCED,
        "model.router.density.step=off",
    ),
    "unwatched": ("experiment=tiny_moe", "logging.layer_interval=0"),
    "unjudged": ("experiment=tiny_mone", "logging.alerts.enabled=false"),
}  # fmt: skip


def another(key: str, group: Group, name: str) -> Iterator[Any]:
    """Yields other values of a field that are right by themselves."""
    (field,) = (field for field in fields(type(group)) if field.name == name)
    value = getattr(group, name)
    for mark in field.marks:
        if isinstance(mark, NameIn):
            yield from (other for other in mark.registry.names if other != value)
            return
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + (0.25 if isinstance(value, float) and value < 0.7 else 1)
    elif isinstance(value, str):
        yield from (other for other in getattr(field.kind, "__args__", ("a",)) if other != value)
    elif value == ():
        yield {"data.paths": ("a",), "data.weights": (1.0,)}[key]
    else:
        raise AssertionError(f"{key}: no other value than {value!r} is known here")


def with_value(group: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = with_value(getattr(group, name), rest, value) if rest else value
    return replace(group, **{name: inner})


def is_refused(config: Config, key: str, value: Any) -> bool:
    try:
        validate(with_value(config, key.split("."), value), world_size=1, num_devices=0)
    except ConfigError as error:
        return any(line.startswith(f"{key}: ") for line in error.problems)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_left_unread_without_a_word(run: str, tmp_path: Path) -> None:
    """Trains, and looks at each key that nothing but the checks has read."""
    overrides = (*QUIET, *RUNS[run], f"run.dir={tmp_path}/run")
    script, file = Path(__file__).parent / "record_reads.py", tmp_path / "unread.json"
    done = run_python([str(script), str(file), *overrides], folder=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    config = compose(overrides)
    told = unread_keys(config)
    silent, unread = [], json.loads(file.read_text(encoding="utf-8"))
    # Of the Python standard library, which has no paths.
    assert "data.paths" in unread
    for key in unread:
        *path, name = key.split(".")
        group: Any = config
        for part in path:
            group = getattr(group, part)
        if key in told:
            continue
        accepted = [
            value for value in another(key, group, name) if not is_refused(config, key, value)
        ]
        if accepted:
            silent.append(f"{key}={accepted[0]}")
    assert not silent
