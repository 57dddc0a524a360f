"""Defines what an optimizer is: it turns gradients into updates, in megatron-core's machinery.

It imports no torch, so that names can be checked without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Optimizer:
    """Describes one optimizer; ``optim.name`` names it.

    megatron-core clips gradients by their norm, keeps fp32 masters of bf16 weights, shards state
    over data-parallel ranks and schedules the learning rate, whatever the optimizer is.

    Attributes:
        name: the optimizer's name in the configuration.
        formula: what it does, for tables.
        source: the paper or place that it comes from.
        make: makes a torch optimizer of parameter groups (dictionaries with ``params``, ``lr`` and
            ``weight_decay``; the scheduler sets the last two) and the ``optim`` section of the
            configuration. It sees stand-ins for the parameters, and gets the groups with the real
            ones, which may be flat slices, when it is made. None is megatron-core's own Adam.
        moments: the names of the tensors that it keeps for each parameter, of the parameter's shape
            and fp32, in ``optimizer.state[parameter]``. Checkpoints hold them, and the planner
            counts them. Anything else that it keeps would be lost when a run resumes.
        whole: whether it needs each weight whole, with its axes; refused where weights are cut over
            ranks (the distributed optimizer gives it flat slices).
        matrix_moments: what it keeps of ``moments`` for matrices (:func:`is_matrix`); None for all.
            Of whole weights only.
    """

    name: str
    formula: str
    source: str
    moments: tuple[str, ...]
    make: Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer] | None = None
    whole: bool = False
    matrix_moments: tuple[str, ...] | None = None

    def moments_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Returns the names of what is kept for one parameter of the model."""
        if self.matrix_moments is not None and is_matrix(parameter):
            return self.matrix_moments
        return self.moments


def is_matrix(parameter: torch.Tensor) -> bool:
    """Returns whether a parameter is a projection, or experts' of any number of axes.

    Embeddings and the output layer are tables of tokens.
    """
    table = getattr(parameter, "is_embedding_or_output_parameter", False)
    return parameter.dim() >= 2 and not table
