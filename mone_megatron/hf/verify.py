"""Tells whether two models are the same, by logits on real text and choices of each token.

Two programs add in different orders, so a score at the edge of a top-k can fall on either side of
it by rounding; what follows in that sequence then differs by more than rounding. So sequences are
compared up to the first such token, and at least nine tokens in ten must be compared: a tie is
rare, while a wrong rule or a wrong weight shows at every token. The report says how many were.

Rounding errors grow with what is rounded, so a difference of two logits is measured in the scale of
the token's logits: their root mean square. A bound in logits itself would refuse a right model
whose logits are large and accept a wrong one whose logits are small. There are two bounds, because
rounding is small at nearly all tokens and now and then large at one (a score beside a threshold, a
softmax of large scores): one for the token that differs most, which a fault in one expert crosses
at the tokens that use it, and one thirty times as tight for half of the tokens, which a small
fault that all of them share crosses (an epsilon, a frequency).

Shape suffixes: B sequences, S positions, V vocabulary, N tokens (B * S), C compared tokens,
A experts, E experts, F neurons, R rows (a token once for each of its experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mone_megatron.hf.experts_mone import (
    ExpertRows,
    ExpertsModule,
    NeuronSettings,
    down_norms,
    experts_modules,
    fills_places,
    has_own_weights,
    split_projections,
    state_of,
)
from mone_megatron.hf.modeling_mone import MoneProductKeyExperts

# Largest difference of two logits at any token, in fp32, over the scale of the token's logits.
# Rounding came to 1.5e-5 in an upcycled Llama of 30 layers and 135M parameters, and to 1.5e-4 in
# small models with weights so large that tokens are as sensitive as can be; the smallest fault in
# one place that was tried, two neurons of one expert of 12 swapped, came to 0.1 (tests/hf).
LARGEST = 1e-3
# Root mean square difference of a token's logits, over the same scale: at half of the tokens at
# most this. Rounding came to 2.4e-6 in that Llama, and grows with the square roots of depth and
# width: about 1.5e-5 in 60 layers of 8192. An epsilon of 1e-5 for 1e-6 came to 7e-5 and more.
TYPICAL = 3e-5
# Share of tokens that must be compared.
_ENOUGH = 0.9


@dataclass
class LayerChoices:
    """Holds what one layer of experts chose for each token.

    ``experts`` is bool ``[N, A]``, or of product keys, whose experts are many, int64 ``[N, C]``:
    the numbers of each head's, in order. ``masks`` has, by ``(n, a)``, the neurons that token n
    keeps in expert a, bool ``[F]``, and is empty where the layer does not select.
    """

    experts: Tensor
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Holds the outcome of one verification; differences are those of compared tokens."""

    tokens: int
    # Of the logits of each compared token: their root mean square, and the largest and the root
    # mean square difference, both over it. fp32.
    scale_C: Tensor
    largest_C: Tensor
    typical_C: Tensor
    masks: int
    equal_masks: int

    @property
    def compared(self) -> int:
        """Returns the number of tokens that were compared."""
        return self.scale_C.numel()

    @property
    def largest_difference(self) -> float:
        """Returns the largest difference of two logits, over the scale of their token's logits."""
        # The largest of anything and NaN is NaN, which is never within a bound.
        return float(self.largest_C.max()) if self.compared else 0.0

    @property
    def typical_difference(self) -> float:
        """Returns the difference that half of the tokens do not exceed.

        A token's is the root mean square over its logits, over the scale of its logits.
        """
        return float(self.typical_C.median()) if self.compared else 0.0

    @property
    def faults(self) -> list[str]:
        """Returns what tells the two models apart, in words; empty when they are the same."""
        found = []
        if self.compared < _ENOUGH * self.tokens:
            found.append(
                f"only {self.compared:,} of {self.tokens:,} tokens come before another choice of "
                f"experts or neurons in their sequence ({_ENOUGH:.0%} must)"
            )
        if not self.largest_difference <= LARGEST:
            found.append(
                f"at one token logits differ by {self.largest_difference:.1e} of their scale "
                f"(allowed {LARGEST:.0e})"
            )
        if not self.typical_difference <= TYPICAL:
            found.append(
                f"at half of the tokens logits differ by more than {self.typical_difference:.1e} "
                f"of their scale (allowed {TYPICAL:.0e})"
            )
        return found

    @property
    def holds(self) -> bool:
        """Returns whether the two models are the same."""
        return not self.faults

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """Joins the outcomes of several batches."""
        return cls(
            tokens=sum(part.tokens for part in parts),
            scale_C=torch.cat([part.scale_C for part in parts]),
            largest_C=torch.cat([part.largest_C for part in parts]),
            typical_C=torch.cat([part.typical_C for part in parts]),
            masks=sum(part.masks for part in parts),
            equal_masks=sum(part.equal_masks for part in parts),
        )

    def describe(self) -> str:
        """Returns one line for people: the differences, or what is wrong."""
        if self.faults:
            return f"the two models differ: {'; '.join(self.faults)}"
        masks = ""
        if self.masks:
            masks = f"; {self.equal_masks:,} of {self.masks:,} kept-neuron masks equal"
        return (
            f"logits differ by at most {self.largest_difference:.1e} of their scale (allowed "
            f"{LARGEST:.0e}), {self.typical_difference:.1e} at half of the tokens (allowed "
            f"{TYPICAL:.0e}), in fp32 on {self.compared:,} of {self.tokens:,} tokens, whose logits "
            f"have a root mean square of {float(self.scale_C.mean()):.3g}{masks}"
        )


def compare(
    ours_BSV: Tensor,
    theirs_BSV: Tensor,
    our_choices: list[LayerChoices],
    their_choices: list[LayerChoices],
) -> Comparison:
    """Compares two models' logits and choices on the same tokens.

    Args:
        ours_BSV: logits, fp32.
        theirs_BSV: logits, fp32; their root mean square is the scale.
        our_choices: of each MoE layer.
        their_choices: likewise; the same number of layers.
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
    compared_BS = differs_N.view(sequences, length).cumsum(dim=-1) == 0
    theirs_CV = theirs_BSV[compared_BS]
    difference_CV = ours_BSV[compared_BS] - theirs_CV
    scale_C = _root_mean_square(theirs_CV)
    # Logits that are all zero are the same in no scale but zero.
    unit_C = scale_C.clamp_min(torch.finfo(torch.float32).tiny)
    return Comparison(
        tokens=sequences * length,
        scale_C=scale_C,
        largest_C=difference_CV.abs().amax(dim=-1) / unit_C,
        typical_C=_root_mean_square(difference_CV) / unit_C,
        masks=masks,
        equal_masks=equal,
    )


def _root_mean_square(values_CV: Tensor) -> Tensor:
    return values_CV.square().mean(dim=-1).sqrt()


def _projections(
    experts: ExpertsModule, rows_RH: Tensor, expert_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns gate and up projections ``[R, F]`` of rows that are sorted by expert."""
    counts = expert_R.bincount(minlength=experts.num_experts).tolist()

    def product(rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        parts = zip(rows_RI.split(counts), weight_EOI, strict=True)
        return torch.cat([rows @ weight.T for rows, weight in parts])

    if has_own_weights(experts):
        both: tuple[Tensor, Tensor] = cast(Any, experts).gate_and_up(rows_RH, product)
        return both
    return split_projections(experts, product(rows_RH, experts.gate_up_proj))


@torch.no_grad()
def product_key_choices(experts: Any, tokens_NH: Tensor) -> LayerChoices:
    """Returns what a layer of product keys, ours or of an export, chooses for tokens."""
    _, expert_NPK = experts.choose(tokens_NH)
    return LayerChoices(expert_NPK.sort(dim=-1).values.flatten(1))


@torch.no_grad()
def hf_logits_and_choices(
    model: PreTrainedModel, tokens_BS: Tensor
) -> tuple[Tensor, list[LayerChoices]]:
    """Returns fp32 logits ``[B, S, V]`` of a transformers model, and its experts' choices."""
    found: list[LayerChoices] = []

    def saw_experts(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        experts = cast(ExpertsModule, module)
        hidden_NH, index_NK, weights_NK = inputs[:3]
        chosen_NA = torch.zeros(len(hidden_NH), experts.num_experts, dtype=torch.bool)
        weight_NA = weights_NK.new_zeros(chosen_NA.shape).scatter(-1, index_NK, weights_NK)
        chosen_NA = chosen_NA.scatter(-1, index_NK, True)
        choices = LayerChoices(weight_NA != 0 if fills_places(experts) else chosen_NA)
        found.append(choices)
        settings = getattr(experts.config, "mone", None)
        if not settings or "routed" not in settings["apply_to"]:
            return
        neurons = NeuronSettings.from_config(settings)
        if neurons.kept(experts.intermediate_dim) == experts.intermediate_dim:
            return
        expert_R, token_R = choices.experts.T.nonzero().unbind(dim=-1)
        gate_RF, up_RF = _projections(experts, hidden_NH[token_R], expert_R)
        masks_RF = neurons.mask(
            gate_RF,
            up_RF,
            experts.act_fn,
            down_norm=partial(down_norms, experts, expert_R),
            state=state_of(experts, neurons),
            rows=ExpertRows(expert_R, token_R, weight_NA[token_R, expert_R]),
        )
        places = zip(token_R.tolist(), expert_R.tolist(), strict=True)
        choices.masks = dict(zip(places, masks_RF, strict=True))

    def saw_product_keys(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(product_key_choices(module, inputs[0].flatten(0, -2)))

    handles = [module.register_forward_pre_hook(saw_experts) for module in experts_modules(model)]
    for module in model.modules():
        if isinstance(module, MoneProductKeyExperts):
            handles.append(module.register_forward_pre_hook(saw_product_keys))
    try:
        return model(tokens_BS, use_cache=False).logits.float(), found
    finally:
        for handle in handles:
            handle.remove()
