"""Whether two models are the same: logits on real text, and which experts and neurons tokens use.

Two programs add in different orders, so a score at the edge of a top-k can fall on either side of
it by rounding; what follows in that sequence then differs by more than rounding. So sequences are
compared up to the first such token, and at least nine tokens in ten must be compared: a tie is
rare, while a wrong rule or a wrong weight shows at every token. The report says how many were.

Shape suffixes: B sequences, S positions, V vocabulary, N tokens (B * S), A experts, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mone_megatron.hf.experts_mone import ExpertsModule, NeuronSettings, experts_modules

# Largest difference of two logits, in fp32.
TOLERANCE = 1e-4
# Share of tokens that must be compared.
_ENOUGH = 0.9


@dataclass
class LayerChoices:
    """What one MoE layer chose: ``experts`` ``[N, A]`` bool; the kept neurons ``[F]`` of (n, a)."""

    experts: Tensor
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The outcome of one verification."""

    tokens: int
    compared: int
    largest_difference: float
    masks: int
    equal_masks: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the two models are the same."""
        return self.compared >= _ENOUGH * self.tokens and self.largest_difference <= self.tolerance

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """One of several batches."""
        differences = torch.tensor([part.largest_difference for part in parts])
        return cls(
            tokens=sum(part.tokens for part in parts),
            compared=sum(part.compared for part in parts),
            largest_difference=float(differences.max()),  # NaN if any is
            masks=sum(part.masks for part in parts),
            equal_masks=sum(part.equal_masks for part in parts),
            tolerance=parts[0].tolerance,
        )

    def describe(self) -> str:
        """One line for people."""
        masks = ""
        if self.masks:
            masks = f"; {self.equal_masks:,} of {self.masks:,} kept-neuron masks equal"
        return (
            f"logits differ by at most {self.largest_difference:.2e} (tolerance "
            f"{self.tolerance:.0e}, fp32) on {self.compared:,} of {self.tokens:,} tokens{masks}"
        )


def compare(
    ours_BSV: Tensor,
    theirs_BSV: Tensor,
    our_choices: list[LayerChoices],
    their_choices: list[LayerChoices],
    *,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare two models' logits and choices on the same tokens.

    Args:
        ours_BSV: logits, fp32.
        theirs_BSV: logits, fp32.
        our_choices: of each MoE layer.
        their_choices: likewise; the same number of layers.
        tolerance: see :data:`TOLERANCE`.
    """
    assert len(our_choices) == len(their_choices), (len(our_choices), len(their_choices))
    sequences, length = ours_BSV.shape[:2]
    differs_N = torch.zeros(sequences * length, dtype=torch.bool)
    masks = equal = 0
    for ours, theirs in zip(our_choices, their_choices, strict=True):
        differs_N |= (ours.experts != theirs.experts).any(dim=-1)
        for place in ours.masks.keys() & theirs.masks.keys():
            masks += 1
            if torch.equal(ours.masks[place], theirs.masks[place]):
                equal += 1
            else:
                differs_N[place[0]] = True
    # Attention carries a difference to all later tokens of its sequence, and to none before.
    after_BS = differs_N.view(sequences, length).cumsum(dim=-1) > 0
    difference_BS = (ours_BSV - theirs_BSV).abs().amax(dim=-1)
    kept = difference_BS[~after_BS]
    # The largest of anything and NaN is NaN, which is never within a tolerance.
    largest = float(kept.max()) if kept.numel() else 0.0
    return Comparison(
        tokens=sequences * length,
        compared=int(kept.numel()),
        largest_difference=largest,
        masks=masks,
        equal_masks=equal,
        tolerance=tolerance,
    )


@torch.no_grad()
def hf_logits_and_choices(
    model: PreTrainedModel, tokens_BS: Tensor
) -> tuple[Tensor, list[LayerChoices]]:
    """Logits ``[B, S, V]`` of a transformers model, and its choices in the layers with experts."""
    found: list[LayerChoices] = []

    def saw_experts(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        experts = cast(ExpertsModule, module)
        hidden_NH, index_NK = inputs[0], inputs[1]
        chosen_NA = torch.zeros(len(hidden_NH), experts.num_experts, dtype=torch.bool)
        choices = LayerChoices(chosen_NA.scatter(-1, index_NK, True))
        found.append(choices)
        settings = getattr(experts.config, "mone", None)
        if not settings or "routed" not in settings["apply_to"]:
            return
        neurons = NeuronSettings.from_config(settings)
        if neurons.kept(experts.intermediate_dim) == experts.intermediate_dim:
            return
        for expert in choices.experts.any(dim=0).nonzero().flatten().tolist():
            rows = choices.experts[:, expert].nonzero().flatten()
            gate_up = hidden_NH[rows] @ experts.gate_up_proj[expert].T
            gate_TF, up_TF = gate_up.chunk(2, dim=-1)
            masks_TF = neurons.mask(gate_TF, up_TF, experts.act_fn)
            for row, mask in zip(rows.tolist(), masks_TF, strict=True):
                choices.masks[row, expert] = mask

    handles = [module.register_forward_pre_hook(saw_experts) for module in experts_modules(model)]
    try:
        return model(tokens_BS, use_cache=False).logits.float(), found
    finally:
        for handle in handles:
            handle.remove()
