"""Counts the floating-point operations of training from the config alone.

A multiply-add is 2 operations. Counted is every matrix product (projections, attention, router,
experts, output layer over the padded vocabulary, and those of multi-token prediction) and nothing
else: norms, RoPE, softmax, the selection and the optimizer are left out, as is usual. Attention is
causal: a token of a sequence of s reads (s + 1) / 2 keys on average, and in a window those of it
alone. The backward pass costs twice the forward pass. Activations that are recomputed are not
counted twice, nor are the zeros counted that widen MLA's values to the width of its keys.

Each count comes as a pair. `ideal` has MoNE compute only the kept neurons of the up and down
projections (the gate is always computed in full); `realised` is what dense matrix products run,
which is the same as for MoE. Without MoNE the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from mone_megatron.config.schema import Config, ModelConfig, MoNEConfig
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.planning.attention import projection_flops, score_flops
from mone_megatron.planning.parameters import (
    gated_mlps,
    moe_layers_of,
    prediction_layers,
    product_key_layer,
)

_BACKWARD = 2  # times the forward pass: gradients of the inputs and of the weights


@dataclass(frozen=True)
class Flops:
    """Holds the operations that the method needs, and those that dense kernels do for it."""

    ideal: int
    realised: int


def forward_flops_per_token(
    model: ModelConfig, mone: MoNEConfig, seq_length: int, vocab_size: int
) -> Flops:
    """Returns the operations of one token's forward pass in sequences of ``seq_length`` tokens."""
    hidden = model.hidden_size
    router = ROUTERS[model.router.kind].products(model.router_settings)
    gates = router + (hidden if model.shared_expert_gate else 0)
    output = 2 * hidden * model.padded_vocab_size(vocab_size)
    later = prediction_layers(model)
    common = (
        (model.num_layers + later.num_layers) * projection_flops(model)
        + score_flops(model, seq_length)
        + score_flops(later, seq_length)
        + (moe_layers_of(model) + moe_layers_of(later)) * 2 * gates
        + output
        # What joins the embedding of a later token to the layer below, and the output once more.
        + later.num_layers * (2 * 2 * hidden * hidden + output)
    )
    if model.experts == "product_key":
        keys, layer = model.product_key, product_key_layer(model)
        # Each head compares its two halves with the keys of their sides.
        compared = keys.heads * layer.weights["key"]
        used = layer.weights["query"] + compared + layer.chosen * layer.expert
        common += model.num_layers * 2 * used
    mlps = [*gated_mlps(model, mone).values(), *gated_mlps(later, mone).values()]
    return Flops(
        ideal=common + sum(2 * mlp.visited * mlp.gate_counted for mlp in mlps),
        realised=common + sum(2 * mlp.visited * mlp.parameters for mlp in mlps),
    )


def training_flops_per_token(
    model: ModelConfig, mone: MoNEConfig, seq_length: int, vocab_size: int
) -> Flops:
    """Returns the operations of a token's forward and backward pass: three times the forward's."""
    forward = forward_flops_per_token(model, mone, seq_length, vocab_size)
    times = 1 + _BACKWARD
    return Flops(ideal=times * forward.ideal, realised=times * forward.realised)


def flops_per_step(config: Config, vocab_size: int) -> Flops:
    """Returns the operations of a step over all processes; ``vocab_size`` is the unpadded one."""
    train = config.train
    token = training_flops_per_token(config.model, config.mone, train.seq_length, vocab_size)
    tokens = train.global_batch_size * train.seq_length
    return Flops(ideal=tokens * token.ideal, realised=tokens * token.realised)
