"""Defines the group ``optim``: the optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from mone_megatron.config.group import Group
from mone_megatron.config.marks import Above, AtLeast, NameIn, Within
from mone_megatron.methods.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class OptimConfig(Group):
    """Sets the optimizer, by default Adam with decoupled weight decay, and its learning rate."""

    name: Annotated[str, NameIn(OPTIMIZERS)] = "adam"
    """The optimizer that applies the gradients."""
    lr: Annotated[float, Above(0)] = 3e-4
    """The peak learning rate."""
    min_lr: Annotated[float, AtLeast(0)] = 3e-5
    """The learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """The way from `lr` to `min_lr`; `wsd` is warmup-stable-decay."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """The steps of linear warmup."""
    decay_fraction: Annotated[float, Within("(0, 1]", example=0.1)] = 0.1
    """The share of all steps spent in the final decay of `wsd`."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.1
    """Decoupled weight decay."""
    beta1: Annotated[float, Within("[0, 1)")] = 0.9
    """The decay rate of Adam's first moment."""
    beta2: Annotated[float, Within("[0, 1)")] = 0.95
    """The decay rate of Adam's second moment."""
    eps: Annotated[float, Above(0)] = 1e-8
    """What Adam adds to the root of the second moment."""
    clip_grad: Annotated[float, AtLeast(0)] = 1.0
    """The largest global gradient norm; 0 for no clipping."""

    def unread(self) -> Mapping[str, str]:
        """Returns what is of schedules that are not used."""
        why = f"optim.schedule={self.schedule}"
        unread = {} if self.schedule == "wsd" else {"decay_fraction": why}
        return unread | ({"min_lr": why} if self.schedule == "constant" else {})

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if self.min_lr > self.lr > 0:
            yield (
                f"optim.min_lr: {self.min_lr:g} is above optim.lr={self.lr:g}; use optim.lr or less"
            )
