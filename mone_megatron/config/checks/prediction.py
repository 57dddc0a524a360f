"""Checks multi-token prediction against what its layers see of a sequence."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields what later tokens cannot be predicted with."""
    depth, parallel, length = config.model.mtp.depth, config.parallel, config.train.seq_length
    if depth < 1:
        return
    off = "or model.mtp.depth=0"
    if config.model.full_attention_every:
        yield (
            f"model.mtp.depth: {depth} with model.full_attention_every="
            f"{config.model.full_attention_every}: releases of megatron-core number its layers "
            f"differently; use model.full_attention_every=0, {off}"
        )
    if depth >= length > 0:
        yield (
            f"model.mtp.depth: {depth} tokens after the next one, and train.seq_length={length} "
            f"has no place for them; use {length - 1} or fewer"
        )
    if parallel.context > 1:
        yield (
            f"model.mtp.depth: {depth} with parallel.context={parallel.context}, whose ranks would "
            "each divide the loss by the tokens that they have; use parallel.context=1, "
            f"{off}"
        )
    if config.data.reset_attention:
        yield (
            f"model.mtp.depth: {depth} with data.reset_attention=true, where a document's last "
            "tokens would be to predict those of the next; use data.reset_attention=false, "
            f"{off}"
        )
    if config.model.tie_embeddings and parallel.pipeline > 1:
        yield (
            f"model.mtp.depth: {depth} with model.tie_embeddings=true and parallel.pipeline="
            f"{parallel.pipeline}: megatron-core saves no checkpoint of it; use "
            f"parallel.pipeline=1, model.tie_embeddings=false, {off}"
        )
