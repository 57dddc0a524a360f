"""Every key of the configuration is in the planner's model, or named with why it is not."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mone_megatron.config.group import Group
from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.planning import plan as planning
from mone_megatron.planning.hardware import find_gpu
from mone_megatron.planning.unmodelled import NO_WEIGHT, NOT_MODELLED, unmodelled

# megatron-core's own fields are told one by one (`unmodelled`).
OPEN = "megatron."
# Whose reading counts: arithmetic of planning, and properties of the groups that it asks.
READERS = ("mone_megatron.planning", "mone_megatron.config", "mone_megatron.methods")
LATENT = ("model.attention=mla", "model.num_query_groups=4", "model.qk_norm=false")
CASES: tuple[tuple[str, ...], ...] = (
    (),
    LATENT,
    ("model.num_experts=0", "mone.apply_to=[dense]"),
    ("model.shared_expert_ffn_hidden_size=64", "model.sparsity_loss=l1"),
    ("model.attention_window=8", "data.reset_attention=true", "parallel.context=2"),
    ("model.router.kind=autonomy", "parallel.overlap_grad_reduce=true"),
)


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """Each key, with its group and its name there."""
    defaults = cls()
    for field in dataclasses.fields(cls):
        value = getattr(defaults, field.name)
        if isinstance(value, Group):
            yield from keys(type(value), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", cls, field.name


@pytest.fixture(scope="module")
def read() -> set[tuple[type, str]]:
    """The fields that planning reads, over several models; what only validation reads is not."""
    found: set[tuple[type, str]] = set()

    def reading(group: Group, name: str) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(READERS):
            found.add((type(group), name))
        return object.__getattribute__(group, name)

    for overrides in CASES:
        config = compose(["experiment=tiny_mone", "device=cuda", *overrides])
        machine = planning.Machine(find_gpu("H100"), planning.default_gpus(config))
        layout = planning.check_config(config, machine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "check_config", lambda *_, layout=layout: layout)
            patch.setattr(Group, "__getattribute__", reading, raising=False)
            planning.make_plan(config, machine)
    return found


def named(key: str, names: Sequence[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def test_every_key_is_modelled_or_named(read: set[tuple[type, str]]) -> None:
    lost = [
        key
        for key, cls, name in keys(Config)
        if (cls, name) not in read and not named(key, (OPEN, *NO_WEIGHT, *NOT_MODELLED))
    ]
    assert not lost, f"count them in planning, or name them in planning/unmodelled.py: {lost}"


def test_what_is_said_to_weigh_nothing_is_not_read(read: set[tuple[type, str]]) -> None:
    # Read to say how long the run is, or by kernels of the CPU alone.
    also = {"run.name", "train.steps", "mone.balance.weights", "data.paths", "data.source"}
    # Handed to a router with the sizes of its weights, which it tells.
    also |= {"model.router.options", "model.router.top_p", "model.router.threshold"}
    both = [
        key
        for key, cls, name in keys(Config)
        if (cls, name) in read and named(key, NO_WEIGHT) and key not in also
    ]
    assert not both
    every = [key for key, _, _ in keys(Config)]
    for name in (*NO_WEIGHT, *NOT_MODELLED):
        assert any(named(key, (name,)) for key in every), name


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["model.attention_window=16", "model.attention_sink=zero"], []),
        ([*LATENT, "model.attention_sink=zero"], ["model.attention_sink"]),
        (["model.attention_dropout=0.1"], ["model.attention_dropout"]),
        (["mone.balance.scope=group"], ["mone.balance.scope"]),
        (["optim.name=muon", "parallel.distributed_optimizer=false"], ["optim.name"]),
        (["device.kernels=reference"], ["device.kernels"]),
        (["megatron.ddp.bucket_size=1000"], ["megatron.ddp.bucket_size"]),
    ],
)
def test_what_a_plan_says_of_it(overrides: list[str], told: list[str]) -> None:
    config = compose(["experiment=tiny_mone", "device=cuda", *overrides])
    assert unmodelled(config) == told
    plan = planning.make_plan(config, planning.Machine(find_gpu("H100"), 1))
    notes = [note for note in planning.notes(plan) if "not modelled" in note]
    assert [note.split(":")[0] for note in notes] == told
