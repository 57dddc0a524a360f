"""Checks the dispatcher of tokens against the router that it serves and the device it runs on."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.methods.routers import ROUTERS


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields what routers and the flex dispatcher need and do not get."""
    router, parallel = config.model.router, config.parallel
    split = parallel.tensor * parallel.context
    if config.model.num_experts > 0 and ROUTERS[router.kind].reads_batch and split > 1:
        yield (
            f"model.router.kind: {router.kind} looks at all tokens of a microbatch, which "
            f"parallel.tensor*context={split} ranks share; use parallel.tensor=1 and "
            "parallel.context=1"
        )
    yield from _backend(config, resources)
    yield from _capacity(config)
    varied = config.model.num_experts > 0 and not ROUTERS[router.kind].fixed_count
    if varied and config.megatron.transformer.get("moe_permute_fusion"):
        yield (
            "megatron.transformer.moe_permute_fusion: true was not seen to be right with "
            f"model.router.kind={router.kind}, which gives tokens different numbers of experts; "
            "leave it out"
        )
    if config.parallel.dispatcher != "flex":
        return
    if varied:
        yield (
            f"parallel.dispatcher: flex needs as many experts for each token, and "
            f"model.router.kind={router.kind} gives them different numbers; use alltoall"
        )
    if resources.is_cpu(config.device):
        yield "parallel.dispatcher: flex needs CUDA; use alltoall or allgather on a CPU"
    elif not resources.have_deep_ep():
        yield (
            "parallel.dispatcher: flex needs DeepEP, which is not installed; "
            "use alltoall, or install deep_ep"
        )
    yield from _order(config)
    if router.dtype == "fp64":
        yield "model.router.dtype: the flex dispatcher takes fp32 probabilities; use fp32"


def _capacity(config: Config) -> Iterator[str]:
    """Yields a limit of an expert's tokens, which only megatron-core's own assignment reads."""
    kind = config.model.router.kind
    key = "moe_expert_capacity_factor"
    if config.model.num_experts < 1 or config.megatron.transformer.get(key) is None:
        return
    if ROUTERS[kind].own_weights:
        yield (
            f"megatron.transformer.{key}: no token would be dropped with model.router.kind={kind}, "
            "which assigns experts by itself; leave it out"
        )


def _backend(config: Config, resources: Resources) -> Iterator[str]:
    """Yields what is wrong with the backend of the flex dispatcher, a setting of megatron-core."""
    given = config.megatron.transformer
    key = "megatron.transformer.moe_flex_dispatcher_backend"
    if "moe_enable_deepep" in given:
        yield (
            "megatron.transformer.moe_enable_deepep: megatron-core has another field for it; use "
            f"parallel.dispatcher=flex and {key}=deepep"
        )
    backend = given.get("moe_flex_dispatcher_backend")
    if backend not in ("deepep", "hybridep", "ncclep"):
        return  # none, or told as one that the release does not know
    if config.parallel.dispatcher != "flex":
        yield (
            f"{key}: {backend} has no effect with parallel.dispatcher="
            f"{config.parallel.dispatcher}; use parallel.dispatcher=flex, or leave it out"
        )
    elif backend == "ncclep":
        yield f"{key}: ncclep is not supported here; use deepep or hybridep"
    elif backend == "hybridep" and resources.have_deep_ep() and not resources.have_hybrid_ep():
        yield (
            f"{key}: hybridep needs a DeepEP with HybridEPBuffer, which the installed one lacks; "
            "use deepep, or install DeepEP's hybrid-ep branch"
        )


def _order(config: Config) -> Iterator[str]:
    """Yields that the rows of several microbatches would have to be told apart."""
    parallel, mone = config.parallel, config.mone
    if not mone.enabled or "routed" not in mone.apply_to or mone.balance.scope == "group":
        return
    if parallel.expert * parallel.expert_tensor > parallel.tensor * parallel.context:
        yield (
            "parallel.dispatcher: flex mixes the tokens of the microbatches that meet in an "
            "expert, and mone.balance.scope=microbatch keeps them apart; use "
            "mone.balance.scope=group, or alltoall"
        )
