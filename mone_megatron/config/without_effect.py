"""Finds the settings that have no effect beside the others, for people to be told.

They are no mistakes that a run must not begin with: a baseline may share the keys of what it is
compared with. What can only be a mistake is refused (:mod:`mone_megatron.config.checks`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from mone_megatron.config.group import Group, given, names
from mone_megatron.config.schema import Config

# What shipped shapes and experiments set for all that is made of them, a dense model of an MoE or a
# run without W&B: told where a command line sets it.
_OF_VARIANTS = frozenset(
    {
        "model.dense_ffn_hidden_size",
        "model.expert_ffn_hidden_size",
        "model.experts_per_token",
        "data.vocab_size",
        "data.max_megabytes",
        "optim.min_lr",
        "logging.wandb.project",
        "logging.wandb.group",
    }
)


def without_effect(config: Config, written: Collection[str] = ()) -> list[str]:
    """Returns a line for each reason for which settings have no effect.

    Args:
        config: the configuration of a run.
        written: the keys that the command line sets.
    """
    unread = unread_keys(config)
    by_reason: dict[str, list[str]] = {}
    for key, value in given(config):
        if key in unread and _is_news(key, unread[key], written):
            by_reason.setdefault(unread[key], []).append(f"{key}={_written(value)}")
    return [f"no effect with {why}: {', '.join(each)}" for why, each in by_reason.items()]


def _is_news(key: str, why: str, written: Collection[str]) -> bool:
    """Returns whether the user may not know that a setting has no effect.

    Who switches something off on the command line knows of what an experiment sets for it.
    """
    if key in written:
        return True
    switch = why.split("=")[0]
    switched = any(switch == given or switch.startswith(f"{given}.") for given in written)
    return not switched and key not in _OF_VARIANTS


def unread_keys(config: Config) -> dict[str, str]:
    """Returns the reason for each key, set or not, that has no effect beside the others."""
    return {**_of_other_groups(config), **dict(_of_groups(config))}


def _of_groups(group: Group, prefix: str = "", around: str = "") -> Iterator[tuple[str, str]]:
    """Yields key and reason of what the other fields of a group, or of one around it, make so."""
    unread = group.unread()
    for name in names(group):
        value, why = getattr(group, name), around or unread.get(name, "")
        if isinstance(value, Group):
            yield from _of_groups(value, f"{prefix}{name}.", why)
        elif why:
            yield f"{prefix}{name}", why


def _of_other_groups(config: Config) -> dict[str, str]:
    """Returns key and reason of what fields of other groups make so."""
    mone, alerts = config.mone, "logging.alerts"
    no_experts = "model.num_experts=0"
    unread = {}
    if config.model.num_experts < 1:
        unread["parallel.dispatcher"] = no_experts
    if mone.balance.coeff == 0:
        unread[f"{alerts}.shrinking_weights"] = "mone.balance.coeff=0"
    elif mone.balance.normalize:
        unread[f"{alerts}.shrinking_weights"] = "mone.balance.normalize=true"
    if not mone.enabled or mone.keep_ratio == 1:
        why = "mone.keep_ratio=1" if mone.enabled else "mone.enabled=false"
        unread |= {f"{alerts}.{name}": why for name in ("dead_neurons", "shrinking_weights")}
        if config.model.num_experts < 1:
            rest = ("patience", "dead_expert", "load_collapse")
            unread |= {f"{alerts}.{name}": f"{no_experts} and {why}" for name in rest}
    return unread


def _written(value: object) -> str:
    """Returns a value as a command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)
