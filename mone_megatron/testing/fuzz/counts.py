"""Compares what the planner counts with the weights of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from mone_megatron.config.load import from_yaml
from mone_megatron.hf.source import Source, open_source
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import STATE_PREFIX
from mone_megatron.planning.parameters import count_parameters

_ROUTED = ".experts."


def problems(run: Path) -> Iterator[str]:
    """Yields where the numbers of the planner and of ``run.json`` are not those of the weights."""
    source = open_source(run, say=lambda message: None)
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    config = from_yaml(run / "config.yaml")
    vocab_size = facts["vocab_size"]
    padded = count_parameters(config.model, config.mone, vocab_size, padded=True)
    planned = count_parameters(config.model, config.mone, vocab_size)
    sizes = _sizes(source)
    there, counted = sum(sizes.values()), padded.total - padded.prediction
    if there != counted:
        yield f"{there} weights are there, and {counted} are counted"
    if facts["parameters"]["total"] != planned.total:
        yield f"run.json has {facts['parameters']['total']} parameters, and {planned.total} are"
    if facts["parameters"] != planned.recorded:
        yield f"run.json has {facts['parameters']}, and the planner {planned.recorded}"
    router = ROUTERS[config.model.router.kind]
    if config.model.experts == "grouped" and router.fixed_count and not padded.prediction:
        # By the shapes alone: what is of routed experts is used by a share of them.
        routed = sum(size for name, size in sizes.items() if _ROUTED in name)
        unused = 0
        if routed:
            experts = config.model.num_experts
            unused = routed * (experts - config.model.experts_per_token) // experts
        used = padded.total - unused
        if padded.activated_all_neurons != used:
            yield (
                f"a token uses {used} weights of all neurons by their shapes, and "
                f"{padded.activated_all_neurons} are counted"
            )


def _sizes(source: Source) -> dict[str, int]:
    """Returns how many numbers each weight has; what a rule learns is no weight."""
    return {
        name: math.prod(info.shape)
        for name, info in source.weights.items()
        if not name.rpartition(".")[2].startswith(STATE_PREFIX)
    }
