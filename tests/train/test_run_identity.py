"""Whether a checkpoint belongs to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_megatron.config.load import compose
from mone_megatron.train.resume.identity import check_same_model, check_same_run, run_identity

WHERE = Path("runs/a/checkpoints/step_00000003")


def identity(*overrides: str, **facts: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"data_fingerprint": "f", "vocab_size": 512, "dtype": torch.float32}
    return run_identity(compose(["experiment=tiny_mone", *overrides]), **(known | facts))


def check(saved: dict[str, Any], current: dict[str, Any], *, chosen: bool = False) -> list[str]:
    told: list[str] = []
    check_same_run(saved, current, WHERE, chosen=chosen, say=told.append)
    return told


def test_it_survives_json() -> None:
    saved = json.loads(json.dumps(identity()))
    assert check(saved, identity()) == []


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize(
    ("current", "key"),
    [
        (identity("train.seed=7"), "train.seed"),
        (identity("train.steps=7"), "train.steps"),
        (identity("model.router.balance_coeff=[0.5]"), "model.router.balance_coeff"),
        (identity(data_fingerprint="g"), "data_fingerprint"),
        (identity(dtype=torch.bfloat16), "dtype"),
        (identity(vocab_size=7), "vocab_size"),
    ],
)
def test_another_run_is_refused_by_key(current: dict[str, Any], key: str, chosen: bool) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: .* saved, .* configured") as refused:
        check(identity(), current, chosen=chosen)
    assert len(str(refused.value).splitlines()) == 1
    assert "checkpoint.resume=never" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        "mone.keep_ratio=0.5", "mone.balance.coeff=0.5", "optim.lr=0.5", "mone=disabled",
        "model.sparsity_loss=l1",
    ],
)  # fmt: skip
def test_another_recipe_is_for_those_who_name_the_checkpoint(change: str) -> None:
    current = identity(change)
    with pytest.raises(ValueError, match=f"checkpoint.resume={WHERE}"):
        check(identity(), current)
    told = check(identity(), current, chosen=True)
    assert told
    assert all(line.startswith("WARNING: ") for line in told)


def test_a_key_that_only_one_of_them_has_is_told() -> None:
    saved = identity()
    del saved["model.norm_eps"]
    with pytest.raises(ValueError, match=r"^model\.norm_eps: None saved"):
        check(saved, identity())


# Each key with another value than every run had before there was the key.
LATER_KEYS = {
    "mone.rule": "n_of_m", "model.router.kind": "other", "optim.name": "other",
    "model.sparsity_loss": "l1", "model.sparsity_coeff": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", LATER_KEYS)
def test_a_checkpoint_of_before_a_key_is_one_of_its_default(key: str) -> None:
    saved = identity()
    del saved[key]
    assert check(saved, identity()) == []
    check_same_model(saved, identity(), WHERE)
    with pytest.raises(ValueError, match=rf"^{key}: "):
        check(saved, identity() | {key: LATER_KEYS[key]})


def test_weights_may_begin_a_run_with_a_sparsity_loss() -> None:
    check_same_model(identity(), identity("model.sparsity_loss=l1"), WHERE)


@pytest.mark.parametrize(
    "change",
    [
        "megatron.transformer.softmax_scale=0.5",
        "megatron.transformer.rotary_interleaved=true",
        "megatron.transformer.no_rope_freq=2",
    ],
)
def test_weights_begin_no_model_that_computes_otherwise_by_megatron_core(change: str) -> None:
    key = change.split("=")[0]
    check_same_model(identity(change), identity(change), WHERE)
    with pytest.raises(ValueError, match=rf"^{key}: .* weights of another model: use {change}$"):
        check_same_model(identity(change), identity(), WHERE)
    # Also of weights that tell no more than model.*.
    alone = {name: known for name, known in identity().items() if name.startswith("model.")}
    alone["vocab_size"] = 512
    with pytest.raises(ValueError, match=rf"^{key}: None in the checkpoint.*: leave it out$"):
        check_same_model(alone, identity(change), WHERE)


def test_where_layers_lie_is_free() -> None:
    there = identity(
        "megatron.transformer.num_layers_in_first_pipeline_stage=1",
        "megatron.transformer.barrier_with_L1_time=false",
        "megatron.ddp.bucket_size=1000",
        "megatron.optimizer.decoupled_lr=0.1",
    )
    check_same_model(there, identity(), WHERE)
    check_same_model(identity(), there, WHERE)


def test_layout_and_logging_are_free() -> None:
    free = ("parallel.expert=2", "logging.interval=7", "train.on_bad_loss=skip", "run.name=b")
    assert check(identity(), identity(*free)) == []


# What checkpoints named before keys had to be listed where they came; later ones are what every
# run did before, which `identity.py` says.
_FIRST_KEYS = Path(__file__).with_name("first_identity_keys.txt")


def test_a_checkpoint_from_before_a_key_is_gone_on_with_and_begun_with() -> None:
    current = identity()
    first = set(_FIRST_KEYS.read_text(encoding="utf-8").split())
    old = {key: value for key, value in current.items() if key in first}
    assert len(old) < len(current)
    assert check(old, current) == []
    check_same_model(old, current, WHERE)
