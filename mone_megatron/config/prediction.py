"""Defines ``model.mtp``: the prediction of several tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast


@dataclass(frozen=True)
class MTPConfig(Group):
    """Multi-token prediction (DeepSeek-V3): layers after the last that predict later tokens."""

    depth: Annotated[int, AtLeast(0)] = 0
    """How many tokens after the next one are predicted, too, each by a layer of its own
    (docs/parallelism.md#multi-token-prediction); 0 for none."""
    coeff: Annotated[float, AtLeast(0)] = 0.1
    """The coefficient of the mean of their losses, which is added to the loss of the next token."""

    def unread(self) -> Mapping[str, str]:
        """Returns the coefficient where there is no loss."""
        return {} if self.depth else {"coeff": "model.mtp.depth=0"}

    def boundless(self) -> Collection[str]:
        """Returns the coefficient where there is no loss."""
        return self.unread()
