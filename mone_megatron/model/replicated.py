"""Takes the mark of a split weight off those that every tensor-parallel rank has whole.

Transformer Engine marks the weight of each of its linear layers as split over the tensor-parallel
ranks, also where the layer is not (the down projections of multi-latent attention). Whoever reads
the mark goes wrong in silence: each rank would draw another initial weight, and the gradient would
count once for each rank in the gradient norm.
"""

from __future__ import annotations

from torch import nn

# What splits a linear layer of Transformer Engine; with any other mode it is whole on each rank.
_SPLIT = ("column", "row")


def mark_replicated(model: nn.Module) -> None:
    """Takes the mark off weights of modules whose ``parallel_mode`` splits nothing.

    Only Transformer Engine's modules have a mode, and only their marks need it: those of other
    modules are right, and stay.
    """
    for module in model.modules():
        if "parallel_mode" not in module.__dict__ or module.parallel_mode in _SPLIT:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
