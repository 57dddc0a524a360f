"""Whether a checkpoint belongs to this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mone_megatron.config.density import NeuronDensityConfig, RouterDensityConfig
from mone_megatron.config.megatron import may_change_model
from mone_megatron.config.product_key import ProductKeyConfig
from mone_megatron.config.schema import Config
from mone_megatron.data.framing import Framing, framing_of

# What may be changed by someone who names a checkpoint to start from; a run that goes on by
# itself (checkpoint.resume=auto) must be as it was.
_RECIPE = (
    "mone.",
    "optim.",
    "model.sparsity_",
    "model.router.density.",
    "model.mtp.coeff",
    "megatron.",
)
# What decides neither a weight's shape nor what the model computes from its weights; balancing by
# sinkhorn, which routes, is told apart below.
_OF_TRAINING = (
    "model.init_std",
    "model.attention_dropout",
    "model.hidden_dropout",
    "model.router.balance",
    "model.router.balance_coeff",
    "model.router.z_loss_coeff",
    "model.router.expert_bias_rate",
    *(f"model.router.density.{key}" for key in asdict(RouterDensityConfig())),
    "model.sparsity_loss",
    "model.sparsity_coeff",
    "model.mtp.coeff",
)
_ROUTES = "sinkhorn"
_MEGATRON = "megatron.transformer."
# Keys that older checkpoints do not name, with what every run did before there was a choice.
_BEFORE_THE_KEY = {
    "mone.rule": "topk",
    **{f"mone.density.{key}": value for key, value in asdict(NeuronDensityConfig()).items()},
    "mone.straight_through": False,
    "mone.balance.kind": "switch",
    "mone.balance.scope": "microbatch",
    "model.router.kind": "topk",
    "model.router.top_p": 0.4,
    "model.router.rank": 0,
    "model.router.threshold": 0.05,
    **{
        f"model.router.density.{key}": value for key, value in asdict(RouterDensityConfig()).items()
    },
    "model.sparsity_loss": "none",
    "model.sparsity_coeff": 0.0,
    "optim.name": "adam",
    "data.reset_attention": False,
    "model.attention_window": 0,
    "model.full_attention_every": 0,
    "model.attention_sink": "none",
    "model.mtp.depth": 0,
    "model.mtp.coeff": 0.1,
    "model.experts": "grouped",
    "model.gate": "full",
    "model.gate_rank": 0,
    **{f"model.product_key.{key}": value for key, value in asdict(ProductKeyConfig()).items()},
}
# What to look at when a value that nobody configured differs.
_MADE_OF = {
    "data_fingerprint": " (made of data.split, data.weights, the order of data.paths and the bytes "
    "of their files)",
    "vocab_size": " (model.vocab_size, or the tokenizer's if that is 0)",
    "dtype": " (device.dtype)",
}


def run_identity(
    config: Config, *, data_fingerprint: str, vocab_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Returns what a checkpoint says of the run it belongs to: plain values by key."""
    mone = asdict(config.mone)
    # Changes what is kept in memory, and no number.
    del mone["memory"]
    return {
        **_flat("model", asdict(config.model)),
        **_flat("mone", mone),
        **_flat("optim", asdict(config.optim)),
        **_flat("megatron", {part: dict(given) for part, given in config.megatron.given().items()}),
        "data.reset_attention": config.data.reset_attention,
        "train.seed": config.train.seed,
        "train.seq_length": config.train.seq_length,
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.steps": config.train.steps,
        "data_fingerprint": data_fingerprint,
        "vocab_size": vocab_size,
        "dtype": str(dtype),
    }


def check_same_run(
    saved: dict[str, Any],
    current: dict[str, Any],
    where: Path,
    *,
    chosen: bool,
    say: Callable[[str], None],
) -> None:
    """Refuses a checkpoint of other data, another model, another schedule or another recipe.

    Args:
        saved: what the checkpoint says.
        current: this run's.
        where: the checkpoint, for messages.
        chosen: the user named this checkpoint: a changed recipe (``mone.*``, ``optim.*``, the
            sparsity loss) is then meant, and only told.
        say: is told of changes that are let through.

    Raises:
        ValueError: naming every key that differs.
    """
    problems = []
    saved = _BEFORE_THE_KEY | saved
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if old == new and key in saved and key in current:
            continue
        change = f"{key}: {old!r} saved, {new!r} configured{_MADE_OF.get(key, '')}"
        if not key.startswith(_RECIPE):
            problems.append(
                f"{change}; checkpoint.resume cannot go on from {where} with it changed: restore "
                "the value, or start afresh with checkpoint.resume=never"
            )
        elif not chosen:
            problems.append(
                f"{change}; checkpoint.resume=auto goes on as before: restore the value, or name "
                f"the checkpoint to go on with another recipe: checkpoint.resume={where}"
            )
        else:
            say(f"WARNING: {change}; going on with the configured value")
    if problems:
        raise ValueError("\n".join(problems))


def holds_a_run(facts: Mapping[str, Any]) -> bool:
    """Returns whether facts are those of a run, and not of weights alone (an import)."""
    return "layout" in facts and any(key.startswith("train.") for key in facts.get("identity", {}))


def require_run(facts: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on from weights alone.

    Args:
        facts: of the checkpoint.
        where: the checkpoint, for the message.

    Raises:
        ValueError: with the key that begins with its weights.
    """
    if not holds_a_run(facts):
        raise ValueError(
            f"checkpoint {where} holds weights only and no run to go on with; begin one with "
            f"checkpoint.resume=never checkpoint.initialize={where}"
        )


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path) -> None:
    """Refuses the weights of another model for the start of a run.

    What the weights were trained on and how (data, ``train.*``, ``optim.*``, ``mone.*``, dtype) is
    free, and so are the settings of the model that act in training only, and those of megatron-core
    that do not change what it computes.

    Args:
        saved: the identity that the checkpoint tells; of weights alone ``model.*`` and
            ``vocab_size`` are enough.
        current: this run's.
        where: the checkpoint, for messages.

    Raises:
        ValueError: naming every key that differs, with the fix.
    """
    saved = _BEFORE_THE_KEY | dict(saved)
    problems = []
    for key in sorted(saved.keys() | current.keys()):
        if not _is_of_the_model(key):
            continue
        old, new = saved.get(key), current.get(key)
        if (old == new and key in saved and key in current) or _is_free(key, old, new):
            continue
        fix = (
            "use the checkpoint's tokenizer, or data made with it"
            if key == "vocab_size"
            else f"use {key}={_written(old)}"
            if key in saved
            else "leave it out"
            if key.startswith(_MEGATRON)
            else "use a checkpoint that says it"
        )
        problems.append(
            f"{key}: {old!r} in the checkpoint, {new!r} configured{_MADE_OF.get(key, '')}; "
            f"checkpoint.initialize={where} has the weights of another model: {fix}"
        )
    if problems:
        raise ValueError("\n".join(problems))


def other_framing(facts: Mapping[str, Any], framing: Framing | None, where: Path) -> str | None:
    """Tells of data whose documents begin otherwise than those that the weights have seen.

    Args:
        facts: what the checkpoint of the weights tells.
        framing: of this run's documents; None if it is not known.
        where: the checkpoint, for messages.

    Returns:
        One line; None where both are alike, or one is not known.
    """
    if framing is None or facts.get("framing") is None:
        return None
    seen = framing_of(facts["framing"], eod=None, where=f"checkpoint {where}")
    if seen.opening == framing.opening:
        return None
    return (
        f"WARNING: the weights of {where} have seen documents that begin with the tokens "
        f"{list(seen.opening)}, and these data's begin with {list(framing.opening)}; to go on as "
        "before, make the data again with another --bos of tools/preprocess_data.py"
    )


def _is_of_the_model(key: str) -> bool:
    # What model.vocab_size stands for is in vocab_size.
    if key.startswith(_MEGATRON):
        return may_change_model(key.removeprefix(_MEGATRON))
    return key == "vocab_size" or (key.startswith("model.") and key != "model.vocab_size")


def _is_free(key: str, old: Any, new: Any) -> bool:
    if key == "model.router.balance":
        return (_ROUTES in (old or ())) == (_ROUTES in (new or ()))
    return key in _OF_TRAINING


def _written(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_written(item) for item in value) + "]"
    return str(value)


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested settings by dotted key, as JSON gives them back (tuples are lists)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict):
            flat |= _flat(name, value)
        else:
            flat[name] = list(value) if isinstance(value, list | tuple) else value
    return flat
