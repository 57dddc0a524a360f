"""Checks the data against the model that reads it and the evaluation that holds some of it out."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.wording import listed
from mone_megatron.methods.sources import SOURCES


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields a missing validation share, and a vocabulary larger than the model's."""
    data, model, train = config.data, config.model, config.train
    if train.eval_interval > 0 and data.split[0] > 0 and data.split[1] == 0:
        yield (
            f"data.split: {listed(data.split)} has no validation share and train.eval_interval="
            f"{train.eval_interval}; raise the second share, or train.eval_interval=0"
        )
    if not SOURCES[data.source].reads_paths and 0 < model.vocab_size < data.vocab_size:
        yield (
            f"model.vocab_size: {model.vocab_size} is smaller than data.vocab_size="
            f"{data.vocab_size}, so tokens would fall past it; use 0 or {data.vocab_size} or more"
        )
