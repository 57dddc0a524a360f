"""Draws values for the keys of the configuration, from the schema and the registries alone.

A new key, or a new method of a registry, is drawn without a change here. What is listed are the
keys that are not drawn, with the reason, and sizes that would cost time or need another size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal, get_args, get_origin

from mone_megatron.config.marks import Bound, NameIn, OptionsOf
from mone_megatron.config.reference import Field, fields
from mone_megatron.config.schema import Config
from mone_megatron.methods.options import options_of
from mone_megatron.methods.rules import RULES

# What begins like this is the fuzzer's own to set, or not what a run computes.
NOT_DRAWN: Mapping[str, str] = {
    "run.": "the fuzzer names the folders",
    "parallel.tensor.": "layouts are drawn beside the configuration, and compared with one rank",
    "parallel.pipeline.": "the same",
    "parallel.virtual_pipeline.": "the same",
    "parallel.context.": "the same",
    "parallel.expert.": "the same",
    "parallel.expert_tensor.": "the same",
    "parallel.dispatcher.": "the same",
    "parallel.overlap_grad_reduce.": "it needs CUDA",
    "parallel.overlap_param_gather.": "it needs CUDA",
    "checkpoint.interval.": "what is resumed is saved in the middle",
    "checkpoint.resume.": "the fuzzer resumes",
    "checkpoint.initialize.": "it needs another run",
    "checkpoint.keep_last.": "it may delete what is resumed",
    "checkpoint.keep_every.": "it may delete what is resumed",
    "data.source.": "the fuzzer's corpora are drawn as a whole",
    "data.paths.": "the same",
    "data.weights.": "the same",
    "data.tokenizer.": "the same",
    "data.vocab_size.": "the same",
    "data.max_megabytes.": "the same",
    "data.cache_dir.": "the same",
    "data.split.": "shares of a corpus of some hundred documents",
    "device.kind.": "there is no GPU",
    "device.threads.": "sums differ with the threads",
    "device.timeout_seconds.": "a run may wait for the machine",
    "device.grouped_gemm.": "it needs a GPU",
    "logging.wandb.": "a service and a thread for each run",
    "logging.interval.": "what is printed",
    "logging.progress.": "what is printed",
    "logging.report_seconds.": "a clock",
    "logging.tensorboard.": "its writer takes longer than the training",
    "megatron.": "settings of megatron-core by its own names, tests/config/test_megatron_group.py",
    "train.steps.": "resuming compares the later half",
    "train.eval_tasks.": "tasks are files; tests/train/test_task_evaluation.py",
    "train.eval_tasks_interval.": "the same",
    "train.eval_tasks_limit.": "the same",
    "train.profile.": "traces are of later steps",
    "train.exit_after_minutes.": "a clock",
    "model.vocab_size.": "the corpus has one",
}

# Sizes to draw of: others would cost time, or hardly ever fit together.
_SIZES: Mapping[str, tuple[object, ...]] = {
    "model.num_layers": (1, 2, 3, 4),
    "model.hidden_size": (32, 48, 64, 96),
    "model.num_attention_heads": (1, 2, 4, 8),
    "model.num_query_groups": (1, 2, 4, 8),
    "model.head_dim": (0, 8, 16, 24),
    "model.num_experts": (0, 1, 2, 4, 6, 8),
    "model.experts_per_token": (1, 2, 3, 4, 8),
    "model.vocab_padding_multiple": (1, 8, 64, 128),
    "model.mla.q_lora_rank": (0, 8, 24),
    "model.mla.kv_lora_rank": (8, 16, 40),
    "model.mla.qk_nope_head_dim": (8, 16, 24),
    "model.mla.qk_rope_head_dim": (4, 8, 16),
    "model.mla.v_head_dim": (8, 16, 24),
    "model.product_key.keys": (4, 8, 12),
    "model.product_key.key_dim": (4, 8, 16),
    "model.product_key.heads": (1, 2, 4),
    "model.product_key.experts_per_head": (1, 2, 4, 8),
    "model.rope_scaling.factor": (1.5, 4.0, 40.0),
    "model.rope_scaling.original_max_position": (8, 16, 4096),
    "model.rope_scaling.beta_fast": (4.0, 32.0),
    "model.rope_scaling.beta_slow": (0.5, 1.0),
    "model.rope_theta": (100.0, 10000.0, 1e6),
    "model.init_std": (0.005, 0.02, 0.1),
    "model.norm_eps": (1e-6, 1e-5, 1e-3),
    "model.attention_window": (0, 1, 5, 16, 64),
    "model.mtp.depth": (0, 1, 2),
    "train.seq_length": (8, 16, 24, 32, 64),
    "train.global_batch_size": (1, 2, 4, 6, 8),
    "train.micro_batch_size": (1, 2, 4),
    "train.seed": (0, 1, 77, 2**31 - 1),
    "train.eval_steps": (1, 2),
    # Steps that tests call tame: a gradient of rounding alone moves nothing.
    "optim.lr": (1e-4, 1e-3, 3e-3),
    "optim.min_lr": (0.0, 1e-4, 1e-3),
    "optim.eps": (1e-5, 1e-4),
    "optim.beta1": (0.0, 0.9),
    "optim.beta2": (0.9, 0.95, 0.999),
    "data.num_workers": (0, 0, 0, 1),
}
# Lists that have an entry for each of another.
_LENGTHS: Mapping[str, str] = {"model.router.balance_coeff": "model.router.balance"}
_NUMBERS = (0.0, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0)
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Key:
    """Is a key of the configuration that a value can be drawn for.

    Attributes:
        name: dotted, such as ``mone.rule``.
        field: what the schema says of it.
    """

    name: str
    field: Field

    @property
    def is_choice(self) -> bool:
        """Returns whether it chooses among things with names, rather than a size."""
        kind = _item(self.field.kind)
        marks = (*self.field.marks, *_item_marks(self.field.kind))
        named = any(isinstance(mark, NameIn | OptionsOf) for mark in marks)
        return named or kind is bool or get_origin(kind) is Literal

    @property
    def is_method(self) -> bool:
        """Returns whether it names a method of a registry."""
        marks = (*self.field.marks, *_item_marks(self.field.kind))
        return any(isinstance(mark, NameIn) for mark in marks)

    @property
    def owner(self) -> str | None:
        """Returns the key that chooses the method whose options these are; None for others."""
        for mark in self.field.marks:
            if isinstance(mark, OptionsOf):
                return _owner(mark.methods).name
        return None


@functools.cache
def keys() -> tuple[Key, ...]:
    """Returns every key that is drawn."""
    return tuple(_keys(Config, ""))


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    for field in fields(cls):
        name = f"{prefix}{field.name}"
        if f"{name}.".startswith(tuple(NOT_DRAWN)):
            continue
        if field.is_section:
            yield from _keys(field.kind, f"{name}.")
        elif field.kind is not str or name in _TEXTS or Key(name, field).is_method:
            yield Key(name, field)


def _steered() -> tuple[str, ...]:
    """Returns what a density controller may steer: a loss, or what a rule has."""
    names = {name for rule in RULES for name in rule.steerable}
    return ("sparsity_coeff", *sorted(names))


# Texts that name what a method has.
_TEXTS: Mapping[str, Callable[[], Sequence[str]]] = {"mone.density.steers": _steered}


def draw(key: Key, chosen: Mapping[str, str], random: Random) -> dict[str, str]:
    """Returns overrides that set a key: one, or one for each option of an open section.

    Args:
        key: the key.
        chosen: the overrides that stand already; options are those of the method chosen there.
        random: where chance comes from.
    """
    if key.field.is_open:
        return _options(key, chosen, random)
    if key.name in _TEXTS:
        return {key.name: random.choice(_TEXTS[key.name]())}
    if key.name in _SIZES:
        return {key.name: text(random.choice(_SIZES[key.name]))}
    if paired := _LENGTHS.get(key.name):
        count = chosen.get(paired, "x").count(",") + 1
        return {key.name: text([random.choice(_NUMBERS[:5]) for _ in range(count)])}
    value = _value(key.field.kind, key.field.marks, key.field.default, random)
    drawn = {key.name: text(value)}
    for other, paired in _LENGTHS.items():
        if paired == key.name:
            drawn[other] = text(
                [0.0 if one == "none" else random.choice(_NUMBERS[:4]) for one in value]
            )
    return drawn


def text(value: object) -> str:
    """Returns a value as an override has it."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(text, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(key: Key, chosen: Mapping[str, str], random: Random) -> dict[str, str]:
    """Returns options of the method that is chosen: by the key of its registry."""
    (methods,) = (mark.methods for mark in key.field.marks if isinstance(mark, OptionsOf))
    owner = _owner(methods)
    name = chosen.get(owner.name, str(owner.field.default))
    method: Any = next(one for one in methods if one.name == name)
    known = options_of(method.options)
    drawn = {}
    for option, about in known.items():
        if random.random() < 0.6:
            value = _value(type(about.default), about.bounds, about.default, random)
            drawn[f"{key.name}.{option}"] = text(value)
    return drawn


def _owner(methods: Any) -> Key:
    """Returns the key that chooses of a registry."""
    for key in keys():
        for mark in key.field.marks:
            if isinstance(mark, NameIn) and mark.registry is methods:
                return key
    raise AssertionError("options of a registry that no key chooses from")


def _value(kind: Any, marks: tuple[Any, ...], usual: Any, random: Random) -> Any:
    """Returns a value of a type that its bounds allow."""
    if get_origin(kind) is Annotated:
        inner, *marks_of = get_args(kind)
        return _value(inner, tuple(marks_of), usual, random)
    for mark in marks:
        if isinstance(mark, NameIn):
            return random.choice(sorted(mark.registry.names))
    if get_origin(kind) is Literal:
        return random.choice(get_args(kind))
    if kind is bool:
        return random.random() < 0.5
    if get_origin(kind) is tuple:
        return _list(kind, random)
    if kind is str:
        return usual
    wrong = [mark for mark in marks if isinstance(mark, Bound)]
    values = _integers(int(usual)) if kind is int else [*_SHARES, *_NUMBERS, float(usual)]
    right = [value for value in values if not any(bound.problem(value) for bound in wrong)]
    return random.choice(right or [usual])


def _integers(usual: int) -> list[int]:
    return sorted({0, 1, 2, 3, usual // 2, usual // 2 + usual // 4, usual, min(usual * 2, 200)})


def _list(kind: Any, random: Random) -> list[Any]:
    items = get_args(kind)
    if items[-1] is not Ellipsis:
        return [_value(item, (), 0.5, random) for item in items]
    item, marks = _item(kind), _item_marks(kind)
    named = next((mark for mark in marks if isinstance(mark, NameIn)), None)
    if named is not None:
        names: list[Any] = sorted(named.registry.names)
    elif get_origin(item) is Literal:
        names = list(get_args(item))
    else:
        names = list(_NUMBERS)
    return random.sample(names, random.randint(1, min(3, len(names))))


def _item(kind: Any) -> Any:
    """Returns what a list holds, and any other type itself."""
    if get_origin(kind) is not tuple:
        return kind
    item = get_args(kind)[0]
    return get_args(item)[0] if get_origin(item) is Annotated else item


def _item_marks(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is not tuple or get_origin(get_args(kind)[0]) is not Annotated:
        return ()
    return tuple(get_args(get_args(kind)[0])[1:])
