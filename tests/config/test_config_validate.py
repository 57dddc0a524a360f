"""Configs that cannot run are refused before anything starts, by key, with the fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mone_megatron.config import Config, ConfigError, Layout, validate
from mone_megatron.config.convert import from_dict
from mone_megatron.config.layout import (
    expert_parallel_size,
    model_parallel_size,
    smallest_world_size,
)
from mone_megatron.config.marks import NameIn
from mone_megatron.config.reference import fields


def make(**values: Any) -> Config:
    """A config from dotted keys written with double underscores: ``make(train__steps=3)``."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, leaf = name.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return from_dict(Config, tree)


def problems_of(config: Config, world_size: int = 1, **options: Any) -> Sequence[str]:
    try:
        validate(config, world_size=world_size, **options)
    except ConfigError as error:
        return error.problems
    return ()


# World size, config, the key that begins the line, a piece of the explanation or fix.
LATENT: dict[str, Any] = {
    "model__attention": "mla", "model__num_query_groups": 4, "model__qk_norm": False,
    "model__rope_scaling__type": "yarn", "model__rope_scaling__factor": 40.0,
    "model__rope_scaling__mscale": 0.707, "model__rope_scaling__mscale_all_dim": 0.707,
}  # fmt: skip
BAD: list[tuple[int, dict[str, Any], str, str]] = [
    (1, {"model__num_layers": 0}, "model.num_layers", "1 or more"),
    (1, {"model__hidden_size": -8}, "model.hidden_size", "1 or more"),
    (1, {"model__vocab_padding_multiple": 0}, "model.vocab_padding_multiple", "1 or more"),
    (1, {"model__experts_per_token": 0}, "model.experts_per_token", "1 or more"),
    (1, {"model__expert_ffn_hidden_size": 0}, "model.expert_ffn_hidden_size", "1 or more"),
    (1, {"mone__enabled": True, "mone__memory": "packed", "mone__balance__coeff": 0.1,
         "mone__balance__weights": "all"}, "mone.memory", "weights=selected"),
    (2, {"mone__enabled": True, "mone__memory": "packed", "mone__balance__coeff": 0.1,
         "parallel__expert_tensor": 2}, "mone.memory", "parallel.expert_tensor=1"),
    (1, {"parallel__tensor": 0}, "parallel.tensor", "1 or more"),
    (1, {"model__mtp__depth": -1}, "model.mtp.depth", "0 or more"),
    (1, {"model__mtp__depth": 1, "model__mtp__coeff": -0.1}, "model.mtp.coeff", "0 or more"),
    (1, {"model__mtp__depth": 8, "train__seq_length": 8}, "model.mtp.depth", "use 7 or fewer"),
    (2, {"model__mtp__depth": 1, "parallel__context": 2}, "model.mtp.depth",
     "use parallel.context=1, or"),
    (1, {"model__mtp__depth": 1, "model__attention_window": 8, "model__full_attention_every": 2},
     "model.mtp.depth", "use model.full_attention_every=0, or"),
    (1, {"model__mtp__depth": 1, "data__reset_attention": True}, "model.mtp.depth",
     "use data.reset_attention=false, or"),
    (2, {"model__mtp__depth": 1, "model__tie_embeddings": True, "parallel__pipeline": 2},
     "model.mtp.depth", "use parallel.pipeline=1, model.tie_embeddings=false, or"),
    (1, {"parallel__pipeline": 0}, "parallel.pipeline", "1 or more"),
    (1, {"parallel__expert": -1}, "parallel.expert", "1 or more"),
    # Sizes that other checks divide by.
    (3, {"parallel__expert": 0}, "parallel.expert", "1 or more"),
    (2, {"mone__enabled": True, "parallel__expert_tensor": 0},
     "parallel.expert_tensor", "1 or more"),
    (1, {"mone__enabled": True, "mone__memory": "packed", "model__expert_ffn_hidden_size": 0},
     "model.expert_ffn_hidden_size", "1 or more"),
    (1, {"mone__enabled": True, "mone__apply_to": ["dense"], "model__first_dense_layers": 1,
         "model__dense_ffn_hidden_size": 0}, "model.dense_ffn_hidden_size", "1 or more"),
    (1, {"train__steps": 0}, "train.steps", "1 or more"),
    (1, {"train__micro_batch_size": 0}, "train.micro_batch_size", "1 or more"),
    (1, {"train__eval_interval": 5, "train__eval_steps": 0}, "train.eval_steps", "1 or more"),
    (1, {"logging__interval": 0}, "logging.interval", "1 or more"),
    (1, {"device__timeout_seconds": 0}, "device.timeout_seconds", "1 or more"),
    (1, {"train__seed": -1}, "train.seed", "0 or more"),
    (1, {"device__threads": -1}, "device.threads", "0 or more"),
    (1, {"checkpoint__interval": -1}, "checkpoint.interval", "0 or more"),
    (1, {"model__router__z_loss_coeff": -0.1}, "model.router.z_loss_coeff", "0 or more"),
    (1, {"mone__balance__coeff": -0.1}, "mone.balance.coeff", "0 or more"),
    (1, {"optim__lr": 0.0}, "optim.lr", "above 0"),
    (1, {"optim__beta2": 1.0}, "optim.beta2", "[0, 1)"),
    (1, {"model__hidden_dropout": 1.0}, "model.hidden_dropout", "[0, 1)"),
    (1, {"run__dir": " "}, "run.dir", "empty"),
    (1, {"logging__wandb__project": ""}, "logging.wandb.project", "empty"),
    (1, {"model__hidden_size": 130}, "model.hidden_size", "num_attention_heads=4; use 128 or 132"),
    (1, {"model__head_dim": 33}, "model.head_dim", "32 or 34"),
    (1, {"model__num_query_groups": 3}, "model.num_query_groups", "2 or 4"),
    (1, {"model__experts_per_token": 9}, "model.experts_per_token", "8 or fewer"),
    (1, {"model__first_dense_layers": 4}, "model.first_dense_layers", "3 or fewer"),
    (1, {"model__num_experts": 0, "model__first_dense_layers": 1}, "model.first_dense_layers", ""),
    (1, {"model__num_experts": 0, "model__shared_expert_ffn_hidden_size": 64},
     "model.shared_expert_ffn_hidden_size", "needs experts"),
    (1, {"model__shared_expert_gate": True}, "model.shared_expert_gate", "no shared expert"),
    (1, {"model__router__balance_coeff": [0.1, 0.1]}, "model.router.balance_coeff", "2 coeff"),
    (1, {"model__router__balance": [], "model__router__balance_coeff": []},
     "model.router.balance", "[none]"),
    (1, {"model__router__balance": ["aux_loss"] * 2, "model__router__balance_coeff": [0.1] * 2},
     "model.router.balance", "listed 2 times"),
    (1, {"model__router__balance": ["sinkhorn", "aux_loss"],
         "model__router__balance_coeff": [0.0, 0.0]}, "model.router.balance", "excludes"),
    (1, {"model__router__balance": ["sinkhorn"]}, "model.router.balance_coeff", "[0.0]"),
    (1, {"model__router__balance": ["none"]}, "model.router.balance_coeff", "[0.0]"),
    (1, {"model__router__balance": ["sinkhorn"], "model__router__balance_coeff": [0.0],
         "model__router__score_function": "sigmoid"}, "model.router.score_function", "softmax"),
    (1, {"model__router__balance_coeff": [-0.1]}, "model.router.balance_coeff", "negative"),
    (1, {"model__router__expert_bias": True}, "model.router.expert_bias", "sigmoid"),
    (1, {"model__router__expert_bias": True, "model__router__score_function": "sigmoid",
         "model__router__expert_bias_rate": 0.0}, "model.router.expert_bias_rate", "above 0"),
    (1, {"model__experts_per_token": 1}, "model.router.pre_softmax", "no gradient"),
    (1, {"model__router__scaling_factor": 2.0}, "model.router.scaling_factor", "pre_softmax=true"),
    (1, {"model__router__num_groups": 2}, "model.router.group_topk", "both"),
    (1, {"model__router__num_groups": 3, "model__router__group_topk": 1},
     "model.router.num_groups", "2 or 4"),
    (1, {"model__router__balance": ["sinkhorn"], "model__router__balance_coeff": [0.0],
         "model__router__num_groups": 2, "model__router__group_topk": 1},
     "model.router.num_groups", "ignored by sinkhorn"),
    (1, {"model__router__num_groups": 2, "model__router__group_topk": 4},
     "model.router.group_topk", "2 or fewer"),
    (1, {"model__router__num_groups": 8, "model__router__group_topk": 3},
     "model.router.group_topk", "experts_per_token=2"),
    (1, {"model__router__num_groups": 8, "model__router__group_topk": 1},
     "model.router.group_topk", "use 2 or more"),
    (1, {"model__qk_norm": False, "model__qk_norm_scope": "all_heads"},
     "model.qk_norm_scope", "no effect with model.qk_norm=false"),
    (1, {"model__attention": "mla"}, "model.num_query_groups", "use 4"),
    (1, {"model__attention": "mla"}, "model.qk_norm", "use model.qk_norm=false"),
    (1, {"model__attention": "mla", "model__qkv_bias": True}, "model.qkv_bias", "no bias"),
    (1, {"model__attention": "mla", "model__head_dim": 64}, "model.head_dim", "v_head_dim"),
    (1, {"model__attention": "mla", "model__mla__v_head_dim": 0},
     "model.mla.v_head_dim", "1 or more"),
    (1, {"model__attention": "mla", "model__mla__q_lora_rank": -1},
     "model.mla.q_lora_rank", "0 or more"),
    (1, {"model__attention": "mla", "model__mla__qk_rope_head_dim": 7},
     "model.mla.qk_rope_head_dim", "6 or 8"),
    (1, {"model__rope_scaling__type": "yarn"}, "model.rope_scaling.type", "model.attention=mla"),
    (1, {"model__rope_scaling__type": "yarn"}, "model.rope_scaling.factor", "above 1"),
    (1, {"model__rope_scaling__type": "yarn", "model__rope_scaling__original_max_position": 0},
     "model.rope_scaling.original_max_position", "1 or more"),
    (1, {"model__rope_scaling__type": "yarn", "model__rope_scaling__beta_slow": 32.0},
     "model.rope_scaling.beta_fast", "32 and 1"),
    (1, {"model__rope_scaling__type": "yarn", "model__rope_scaling__mscale": 1.0},
     "model.rope_scaling.mscale", "0 for both"),
    (1, {"mone__keep_ratio": 0.0}, "mone.keep_ratio", "(0, 1]"),
    (1, {"mone__keep_ratio": 1.5}, "mone.keep_ratio", "(0, 1]"),
    (1, {"mone__enabled": True, "mone__keep_ratio": 0.003}, "mone.keep_ratio", "K=0"),
    (1, {"mone__enabled": True, "mone__apply_to": []}, "mone.apply_to", "[routed]"),
    (1, {"mone__enabled": True, "mone__apply_to": ["shared"]}, "mone.apply_to", "shared has"),
    (1, {"mone__enabled": True, "mone__apply_to": ["dense"]}, "mone.apply_to", "dense has"),
    (1, {"mone__enabled": True, "model__num_experts": 0}, "mone.apply_to", "routed has"),
    (1, {"mone__enabled": True, "mone__apply_to": ["routed", "routed"]},
     "mone.apply_to", "listed 2 times"),
    (1, {"data__weights": [1.0]}, "data.weights", "1 weights for 0 data.paths"),
    (1, {"data__source": "indexed", "data__paths": ["a"], "data__weights": [0.0]},
     "data.weights", "not above 0"),
    (1, {"data__source": "indexed"}, "data.paths", "preprocess_data"),
    (1, {"data__source": "indexed", "data__paths": [""]}, "data.paths", "empty path"),
    (1, {"data__paths": ["a"]}, "data.paths", "data=indexed"),
    (1, {"data__split": [0.0, 0.0, 0.0]}, "data.split", "sums to 0"),
    (1, {"data__split": [0.0, 1.0, 0.0]}, "data.split", "nothing to train on"),
    (1, {"data__split": [1.0, -0.5, 0.0]}, "data.split", "negative"),
    (1, {"data__split": [1.0, 0.0, 0.0], "train__eval_interval": 5}, "data.split", "eval_interval"),
    (1, {"data__vocab_size": 256}, "data.vocab_size", "257"),
    (1, {"model__vocab_size": 512}, "model.vocab_size", "data.vocab_size=4096"),
    (1, {"optim__min_lr": 1.0}, "optim.min_lr", "optim.lr=0.0003"),
    (1, {"optim__warmup_steps": 100}, "optim.warmup_steps", "99 or fewer"),
    (1, {"optim__decay_fraction": 0.0}, "optim.decay_fraction", "(0, 1]"),
    (1, {"optim__decay_fraction": 1.1}, "optim.decay_fraction", "(0, 1]"),
    (1, {"optim__schedule": "wsd", "optim__warmup_steps": 50, "optim__decay_fraction": 0.6},
     "optim.decay_fraction", "0.5 or less"),
    (8, {"parallel__tensor": 8}, "parallel.tensor", "model.num_attention_heads=4"),
    (4, {"parallel__tensor": 4}, "parallel.tensor", "model.num_query_groups=2"),
    (2, {"parallel__tensor": 2, "model__dense_ffn_hidden_size": 511, "model__num_experts": 0},
     "parallel.tensor", "model.dense_ffn_hidden_size=511"),
    (2, {"parallel__tensor": 2, "model__shared_expert_ffn_hidden_size": 63},
     "parallel.tensor", "model.shared_expert_ffn_hidden_size=62 or 64"),
    (2, {"parallel__tensor": 2, "model__vocab_padding_multiple": 1},
     "parallel.tensor", "model.vocab_padding_multiple=2"),
    (3, {"parallel__expert": 3, "train__global_batch_size": 6},
     "parallel.expert", "parallel.expert=2 or 4"),
    (2, {"parallel__expert": 2, "model__num_experts": 0}, "parallel.expert", "use 1"),
    (2, {"parallel__expert_tensor": 2, "model__num_experts": 0}, "parallel.expert_tensor", "use 1"),
    (3, {"parallel__expert_tensor": 3, "train__global_batch_size": 6},
     "parallel.expert_tensor", "model.expert_ffn_hidden_size=126 or 129"),
    (3, {"parallel__pipeline": 3}, "parallel.pipeline", "model.num_layers=3 or 6"),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 4},
     "parallel.pipeline", "virtual_pipeline=8"),
    (1, {"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline", "parallel.pipeline=1"),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__global_batch_size": 6},
     "parallel.virtual_pipeline", "train.global_batch_size=4 or 8"),
    (2, {"parallel__tensor": 2, "train__seq_length": 255}, "train.seq_length", "254 or 256"),
    (3, {"parallel__tensor": 2}, "parallel.tensor", "world size 3 is not a multiple"),
    (3, {"parallel__pipeline": 2}, "parallel.pipeline", "run 2 or 4 processes"),
    (2, {"parallel__expert": 4}, "parallel.expert", "run 4 processes"),
    (2, {"parallel__expert": 2, "parallel__expert_tensor": 2}, "parallel.expert",
     "parallel.expert*expert_tensor*pipeline=4"),
    (3, {}, "train.global_batch_size", "train.global_batch_size=6 or 12, or 2 processes"),
    (8, {}, "train.global_batch_size", "train.micro_batch_size=1"),
    (1, {"train__micro_batch_size": 3}, "train.global_batch_size", "train.micro_batch_size=2 or 4"),
    (6, {"mone__enabled": True, "mone__balance__coeff": 0.1, "parallel__tensor": 2,
         "parallel__expert": 3, "model__num_experts": 9, "train__global_batch_size": 6},
     "mone.balance.coeff", "parallel.expert=2 or 4"),
    (1, {"checkpoint__initialize": "a", "checkpoint__resume": "b"},
     "checkpoint.initialize", "checkpoint.resume=b"),
    (1, {"parallel__dispatcher": "flex", "device__kind": "cpu"}, "parallel.dispatcher", "CUDA"),
    (1, {"parallel__dispatcher": "flex", "model__router__dtype": "fp64"},
     "model.router.dtype", "fp32"),
    (1, {"parallel__overlap_grad_reduce": True, "device__kind": "cpu"},
     "parallel.overlap_grad_reduce", "false on a CPU"),
    (1, {"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True,
         "parallel__distributed_optimizer": False}, "parallel.overlap_param_gather", "distributed"),
    (1, {"parallel__overlap_param_gather": True}, "parallel.overlap_param_gather", "grad_reduce"),
    (1, {"model__hidden_size": 36, "model__num_attention_heads": 18, "device__dtype": "bf16"},
     "model.hidden_size", "32 or 40"),
    (1, {"model__expert_ffn_hidden_size": 42}, "model.expert_ffn_hidden_size", "40 or 44"),
    (1, {"model__expert_ffn_hidden_size": 44, "device__kind": "cuda"},
     "model.expert_ffn_hidden_size", "40 or 48"),
    (2, {"model__expert_ffn_hidden_size": 44, "parallel__expert_tensor": 2},
     "model.expert_ffn_hidden_size", "40 or 48"),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "values", "key", "hint"), BAD)
def test_bad_configs_are_refused(
    world_size: int, values: dict[str, Any], key: str, hint: str
) -> None:
    lines = problems_of(make(**values), world_size)
    matching = [line for line in lines if line.startswith(f"{key}: ") and hint in line]
    assert matching, lines
    assert all("\n" not in line and ";" in line for line in lines)


def test_all_problems_come_at_once() -> None:
    lines = problems_of(make(train__steps=0, optim__lr=0.0, parallel__expert=3, mone__keep_ratio=0))
    assert {line.split(":")[0] for line in lines} >= {
        "train.steps",
        "optim.lr",
        "parallel.expert",
        "mone.keep_ratio",
    }


@pytest.mark.parametrize(
    ("values", "world_size"),
    [
        ({}, 1),
        ({}, 4),
        ({"parallel__expert": 2}, 2),
        ({"parallel__tensor": 2, "parallel__expert_tensor": 2}, 2),
        ({"parallel__tensor": 2, "parallel__expert_tensor": 1}, 2),
        ({"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, 2),
        ({"parallel__tensor": 2, "parallel__expert": 2}, 4),
        ({"parallel__pipeline": 2, "parallel__expert": 2}, 4),
        # f = 44 is not a multiple of 8 and fp32 does not mind.
        ({"model__expert_ffn_hidden_size": 44}, 1),
        ({"model__router__balance": ["sinkhorn"], "model__router__balance_coeff": [0.0]}, 1),
        ({"model__experts_per_token": 1, "model__router__pre_softmax": True}, 1),
        ({"model__num_experts": 0, "mone__enabled": True, "mone__apply_to": ["dense"]}, 1),
        (LATENT | {"parallel__tensor": 2}, 2),
        # Selection is off, so its targets are not looked at.
        ({"model__num_experts": 0}, 1),
    ],
)
def test_good_configs_pass(values: dict[str, Any], world_size: int) -> None:
    assert problems_of(make(**values), world_size) == ()


def test_latent_attention_and_context_parallelism() -> None:
    (line,) = problems_of(make(**LATENT, parallel__context=2), 2, have_transformer_engine=True)
    assert line.startswith("parallel.context: 2 with model.attention=mla")


def test_layout() -> None:
    config = make(
        parallel__tensor=2, parallel__pipeline=2, parallel__expert=4, train__global_batch_size=16
    )
    assert validate(config, world_size=8) == Layout(
        world_size=8, data=2, expert_data=1, num_microbatches=4, sequence_parallel=True
    )


def test_context_parallelism_with_and_without_transformer_engine() -> None:
    config = make(parallel__context=2)
    assert problems_of(config, 2, have_transformer_engine=False) == ()
    assert problems_of(config, 2, have_transformer_engine=True) == ()
    (line,) = problems_of(
        make(parallel__context=2, train__seq_length=254), 2, have_transformer_engine=True
    )
    assert line.startswith("train.seq_length: 254")


def test_grouped_products_by_transformer_engine_need_it_and_a_gpu() -> None:
    asked: dict[str, Any] = {"device__grouped_gemm": "transformer_engine"}
    on_gpu = make(**asked, device__kind="cuda")
    assert problems_of(on_gpu, 1, have_transformer_engine=True) == ()
    (line,) = problems_of(on_gpu, 1, have_transformer_engine=False)
    assert line.startswith("device.grouped_gemm: Transformer Engine is not installed; use torch")
    (line,) = problems_of(make(**asked, device__kind="cpu"), 1, have_transformer_engine=True)
    assert line == "device.grouped_gemm: Transformer Engine needs CUDA; use torch on a CPU"


def test_flex_needs_deep_ep_and_something_to_exchange() -> None:
    flex: dict[str, Any] = {"parallel__dispatcher": "flex", "device__kind": "cuda"}
    (line,) = problems_of(make(**flex, parallel__expert=2), 2, have_deep_ep=False)
    assert "DeepEP" in line
    assert problems_of(make(**flex, parallel__expert=2), 2, have_deep_ep=True) == ()
    selecting = make(**flex, parallel__expert=2, mone__enabled=True)
    (line,) = problems_of(selecting, 2, have_deep_ep=True)
    assert line.startswith("parallel.dispatcher: flex mixes the tokens of the microbatches")
    assert "mone.balance.scope=group" in line
    together = make(**flex, parallel__expert=2, mone__enabled=True, mone__balance__scope="group")
    assert problems_of(together, 2, have_deep_ep=True) == ()
    (line,) = problems_of(make(**flex), 1, have_deep_ep=True)
    assert line.startswith("parallel.dispatcher: ")


def test_device_against_the_machine() -> None:
    (line,) = problems_of(make(device__kind="cuda"), 1, num_devices=0)
    assert line.startswith("device.kind: cuda")
    (line,) = problems_of(make(), 4, num_devices=2, local_world_size=4)
    assert "run 2 processes or fewer" in line
    assert problems_of(make(device__kind="cpu"), 4, num_devices=2, local_world_size=4) == ()
    # f = 44 fits fp32 (the CPU) and not bf16 (the GPU).
    narrow = make(model__expert_ffn_hidden_size=44)
    assert problems_of(narrow, 1, num_devices=0) == ()
    assert len(problems_of(narrow, 1, num_devices=1)) == 1


_NUMBERS = {
    int: st.sampled_from([-1, 0, 1, 2, 3, 8, 300]),
    float: st.sampled_from([-0.5, 0.0, 0.1, 0.5, 1.0, 2.0]),
    bool: st.booleans(),
    str: st.sampled_from(["", " ", "a"]),
}


def _any_value(kind: Any, marks: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Every value of a field's type, out of bounds or not."""
    if get_origin(kind) is Annotated:
        return _any_value(get_args(kind)[0], get_args(kind)[1:])
    names = [name for mark in marks if isinstance(mark, NameIn) for name in mark.registry.names]
    if names or get_origin(kind) is Literal:
        return st.sampled_from(names or get_args(kind))
    if get_origin(kind) is Mapping:
        return st.dictionaries(st.just("temperature"), st.sampled_from([1, "a", True]))
    if get_origin(kind) is tuple:
        items = get_args(kind)
        sizes = (0, 2) if items[-1] is Ellipsis else (len(items), len(items))
        return st.lists(_any_value(items[0]), min_size=sizes[0], max_size=sizes[1])
    return _NUMBERS[kind]


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, st.SearchStrategy[Any]]]:
    for field in fields(cls):
        if field.is_section:
            yield from _leaves(field.kind, f"{prefix}{field.name}__")
        else:
            yield f"{prefix}{field.name}", _any_value(field.kind, field.marks)


_LEAVES = dict(_leaves(Config))


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    chosen=st.lists(st.sampled_from(sorted(_LEAVES)), max_size=8, unique=True),
    world_size=st.sampled_from([1, 2, 3, 8]),
    num_devices=st.sampled_from([None, 0, 2]),
    selects=st.booleans(),
)
def test_no_values_make_the_checks_fail(
    data: st.DataObject,
    chosen: list[str],
    world_size: int,
    num_devices: int | None,
    selects: bool,
) -> None:
    values = {"mone__enabled": selects} | {key: data.draw(_LEAVES[key]) for key in chosen}
    # Each problem is a line; nothing but a ConfigError may come of values of the right types.
    lines = problems_of(make(**values), world_size, num_devices=num_devices)
    assert all(": " in line and "\n" not in line for line in lines)


sizes = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=200, deadline=None)
@given(
    tensor=sizes, pipeline=sizes, virtual=st.sampled_from([1, 2]), context=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 2, 4, 8]), expert_tensor=sizes, replicas=st.integers(1, 3),
    batch=st.sampled_from([12, 24, 48]), micro=st.sampled_from([1, 2, 3]),
    world_size=st.one_of(st.none(), st.integers(1, 64)),
)  # fmt: skip
def test_whatever_passes_is_consistent(
    tensor: int, pipeline: int, virtual: int, context: int, expert: int, expert_tensor: int,
    replicas: int, batch: int, micro: int, world_size: int | None,
) -> None:  # fmt: skip
    config = make(
        model__num_layers=24, model__num_attention_heads=12, model__num_query_groups=12,
        model__hidden_size=384, model__num_experts=24, model__expert_ffn_hidden_size=192,
        model__dense_ffn_hidden_size=384, model__vocab_padding_multiple=384,
        parallel__tensor=tensor, parallel__pipeline=pipeline, parallel__virtual_pipeline=virtual,
        parallel__context=context, parallel__expert=expert, parallel__expert_tensor=expert_tensor,
        train__global_batch_size=batch, train__micro_batch_size=micro, train__seq_length=192,
        mone__enabled=True, mone__balance__coeff=0.01,
    )  # fmt: skip
    parallel = config.parallel
    world_size = world_size or replicas * smallest_world_size(parallel)
    try:
        layout = validate(config, world_size=world_size, have_transformer_engine=True)
    except ConfigError:
        return
    assert layout.data * model_parallel_size(parallel) == world_size
    assert layout.expert_data * expert_parallel_size(parallel) == world_size
    assert layout.num_microbatches * micro * layout.data == batch
    assert virtual == 1 or (pipeline > 1 and layout.num_microbatches % pipeline == 0)
    assert layout.sequence_parallel == (tensor > 1)
    assert 24 % (pipeline * virtual) == 24 % expert == 192 % expert_tensor == 12 % tensor == 0
    shared, experts = tensor * context, expert * expert_tensor
    assert shared % experts == 0 or experts % shared == 0


@settings(max_examples=100, deadline=None)
@given(world_size=st.integers(1, 16), batch=st.integers(1, 64), micro=st.integers(1, 8))
def test_the_suggested_batch_is_valid(world_size: int, batch: int, micro: int) -> None:
    config = make(train__global_batch_size=batch, train__micro_batch_size=micro)
    lines = problems_of(config, world_size)
    assume(lines)
    (line,) = lines
    suggested = line.split("use train.global_batch_size=")[1].split(",")[0].split(" or ")
    for value in suggested:
        train = replace(config.train, global_batch_size=int(value))
        assert problems_of(replace(config, train=train), world_size) == ()
