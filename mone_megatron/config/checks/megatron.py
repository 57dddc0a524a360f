"""Checks settings of megatron-core by its own names, against the release that is installed."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping

from mone_megatron.config.convert import Scalar
from mone_megatron.config.megatron import (
    BY_NCCL,
    BY_TRANSFORMER_ENGINE,
    FLEX,
    READ_WITH,
    SET_HERE,
    found_in,
    refusal,
    why_not_settable,
)
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.megatron_fields import CLASSES, MLA_CLASS, Field, fields_of
from mone_megatron.megatron_release import megatron_release
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.mone.megatron_settings import (
    CORE_ATTENTION,
    GATED_MLP,
    NORM,
    ROUTED_EXPERTS,
)

# What leaves a field of megatron-core off.
_OFF = (None, False, 0, "none")


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields fields that the installed megatron-core lacks, types wrongly, or that we set."""
    told: list[str] = []
    for part, given in config.megatron.given().items():
        if given:
            told += _part(part, given, latent=config.model.attention == "mla")
    yield from told
    wrong = {line.split(":")[0] for line in told}
    for line in itertools.chain(
        _not_computed(config, resources),
        _without_effect(config, resources),
        _without_a_part(config),
    ):
        key = line.split(":")[0]
        if key not in wrong:
            wrong.add(key)
            yield line
    if config.model.num_experts == 0 and resources.have_transformer_engine():
        yield from _fp8_state(config.megatron.transformer)


def _fp8_state(given: Mapping[str, Scalar]) -> Iterator[str]:
    """Yields the recipe of fp8 whose scales are made of the steps before."""
    if given.get("fp8") and given.get("fp8_recipe", "delayed") == "delayed":
        yield (
            "megatron.transformer.fp8_recipe: delayed keeps scales that checkpoints do not hold; "
            "use tensorwise, blockwise or mxfp8, or leave megatron.transformer.fp8 out"
        )


def _not_computed(config: Config, resources: Resources) -> Iterator[str]:
    """Yields fields that the modules which stand in for megatron-core's do not read."""
    computed = NORM
    if config.model.num_experts > 0:
        computed = computed | ROUTED_EXPERTS
    elif config.mone.enabled:
        computed = computed | GATED_MLP
    if resources.is_cpu(config.device) or not resources.have_transformer_engine():
        computed = computed | CORE_ATTENTION
    for name, value in config.megatron.transformer.items():
        if (
            name in computed
            and value != computed[name]
            and why_not_settable("transformer", name) is None
        ):
            only = "leave it out" if computed[name] is None else f"only {computed[name]} is"
            yield (
                f"megatron.transformer.{name}: {value} is not computed by the experts, norms or "
                f"attention of this project; {only}"
            )


def _without_effect(config: Config, resources: Resources) -> Iterator[str]:
    """Yields fields that nothing would read, or that would end the run, with what else is set."""
    on_cpu = resources.is_cpu(config.device)
    alone = on_cpu or not resources.have_transformer_engine()
    dispatcher = config.parallel.dispatcher
    for part, given in config.megatron.given().items():
        for name, value in given.items():
            key = f"megatron.{part}.{name}"
            switch = found_in(name, READ_WITH[part])
            switches = () if switch is None else READ_WITH[part][switch]
            if switches and all(given.get(one) in _OFF for one in switches):
                needed = " or ".join(f"megatron.{part}.{one}" for one in switches)
                yield f"{key}: it is read beside {needed} only; leave it out, or set that, too"
            if part == "transformer" and name in BY_TRANSFORMER_ENGINE and alone and value:
                where = "a CPU has none" if on_cpu else "it is not installed"
                yield f"{key}: it needs modules of Transformer Engine ({where}); leave it out"
            if part == "transformer" and name.startswith(FLEX) and dispatcher != "flex":
                yield (
                    f"{key}: it has no effect with parallel.dispatcher={dispatcher}; use "
                    "parallel.dispatcher=flex, or leave it out"
                )
            if part == "ddp" and on_cpu and value and name in BY_NCCL:
                yield f"{key}: it needs NCCL, which is for GPUs; leave it out on a CPU"


def _without_a_part(config: Config) -> Iterator[str]:
    """Yields fields of a part that the model has not, or has of another kind."""
    # How names begin, the key of the part that reads them, and what it is.
    parts = (
        ("moe_", "model.num_experts", config.model.num_experts),
        ("mtp_", "model.mtp.depth", config.model.mtp.depth),
    )
    router = config.model.router.kind
    for name, value in config.megatron.transformer.items():
        key = f"megatron.transformer.{name}"
        for start, ours, count in parts:
            if name.startswith(start) and count == 0:
                yield f"{key}: it has no effect with {ours}=0; leave it out"
        if name == "moe_router_fusion" and value and not ROUTERS[router].stock:
            yield (
                f"{key}: it has no effect with model.router.kind={router}, which megatron-core "
                "does not compute; leave it out"
            )


def _part(part: str, given: Mapping[str, Scalar], *, latent: bool) -> Iterator[str]:
    place = MLA_CLASS if latent and part == "transformer" else CLASSES[part]
    try:
        fields = fields_of(*place)
        release = ".".join(map(str, megatron_release()))
    except ValueError as error:
        yield f"megatron.{part}: {error}"
        return
    where = f"{place[1]} of megatron-core {release}"
    for name, value in given.items():
        key = f"megatron.{part}.{name}"
        known = name in fields or name in SET_HERE[part]
        if known and (wrong := refusal(part, name)):
            yield f"{key}: {wrong}"
        elif name not in fields:
            free = [other for other in fields if why_not_settable(part, other) is None]
            near = difflib.get_close_matches(name, free, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "see its source for the fields"
            yield f"{key}: {where} has no such field; {hint}"
        elif not fields[name].takes(value):
            field = fields[name]
            yield f"{key}: {value!r} is not {_expected(field)} ({where}); {_fix(field)}"


def _expected(field: Field) -> str:
    names = [kind.__name__ for kind in sorted(field.types, key=lambda kind: kind.__name__)]
    names += [repr(choice) for choice in field.choices]
    return " or ".join(names) or f"a value of type {field.annotation}"


def _fix(field: Field) -> str:
    if field.types or field.choices:
        return "use one that is"
    return "a configuration cannot say it: leave it out"
