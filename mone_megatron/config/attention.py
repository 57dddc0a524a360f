"""Defines ``model.mla`` and ``model.rope_scaling``: latent attention and longer sequences."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from mone_megatron.config.group import Group, all_but
from mone_megatron.config.marks import AtLeast
from mone_megatron.config.wording import near_multiples


@dataclass(frozen=True)
class MLAConfig(Group):
    """Sets up multi-latent attention (DeepSeek-V2): keys and values come from a small latent
    vector.
    """

    q_lora_rank: Annotated[int, AtLeast(0)] = 0
    """The size of the latent that queries are projected from; 0 projects them from the hidden
    state."""
    kv_lora_rank: Annotated[int, AtLeast(1)] = 512
    """The size of the latent that keys and values are projected from."""
    qk_nope_head_dim: Annotated[int, AtLeast(1)] = 128
    """The size of the part of a query or key head that is without position."""
    qk_rope_head_dim: Annotated[int, AtLeast(1)] = 64
    """The size of the part of a query or key head that RoPE turns."""
    v_head_dim: Annotated[int, AtLeast(1)] = 128
    """The size of a value head."""

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this section alone."""
        if self.qk_rope_head_dim % 2:
            yield (
                f"model.mla.qk_rope_head_dim: {self.qk_rope_head_dim} is odd and RoPE turns "
                f"pairs; use {near_multiples(self.qk_rope_head_dim, 2)}"
            )


@dataclass(frozen=True)
class RopeScalingConfig(Group):
    """Stretches RoPE for sequences longer than those a model was first trained on."""

    type: Literal["none", "yarn"] = "none"
    """`yarn` (arXiv 2309.00071) as DeepSeek-V2 has it; needs `attention=mla`."""
    factor: float = 1.0
    """How many times longer sequences become; more than 1 with `yarn`."""
    original_max_position: Annotated[int, AtLeast(1)] = 4096
    """The length that sequences had before."""
    beta_fast: float = 32.0
    """Turns within the original length above which a frequency stays."""
    beta_slow: float = 1.0
    """Turns below which a frequency is divided by the factor."""
    mscale: float = 0.0
    """The weight of log(factor) in the scale of queries and keys; with this and `mscale_all_dim` 0
    that scale is 0.1 * log(factor) + 1."""
    mscale_all_dim: float = 0.0
    """The weight of log(factor) in the scale of the scores, and the inverse of that of queries and
    keys."""

    def unread(self) -> Mapping[str, str]:
        """Returns how sequences are stretched where they are not."""
        if self.type != "none":
            return {}
        return all_but(self, ["type"], "model.rope_scaling.type=none")

    def boundless(self) -> Collection[str]:
        """Returns the length before the scaling where there is none."""
        return ("original_max_position",) if self.type == "none" else ()

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this section alone."""
        if self.type == "none":
            return
        if self.factor <= 1:
            yield (
                f"model.rope_scaling.factor: {self.factor:g} does not lengthen anything; use a "
                "number above 1 such as 40"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            yield (
                f"model.rope_scaling.beta_fast: {self.beta_fast:g} and beta_slow="
                f"{self.beta_slow:g}; use beta_fast above beta_slow above 0, such as 32 and 1"
            )
        # Of one without the other transformers and megatron-core make different scales.
        if min(self.mscale, self.mscale_all_dim) < 0 or (
            (self.mscale == 0) != (self.mscale_all_dim == 0)
        ):
            yield (
                f"model.rope_scaling.mscale: {self.mscale:g} with mscale_all_dim="
                f"{self.mscale_all_dim:g}; use two numbers above 0, or 0 for both"
            )
