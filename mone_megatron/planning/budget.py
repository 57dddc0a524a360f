"""Counts what a token of a model costs, also where its use of the model is measured and not set.

Rules without a fixed count keep as many neurons as they find, and some routers send a token to as
many experts as they like. What such a model activates is known when it is trained only; of all
other methods the counts of :mod:`mone_megatron.planning.parameters` are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mone_megatron.config.schema import Config
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.planning.flops import flops_per_step
from mone_megatron.planning.parameters import count_parameters, gated_mlps

# Bytes of a weight in bf16.
_BYTES = 2


@dataclass(frozen=True)
class Usage:
    """Says what the tokens of a run use on average.

    Attributes:
        density: the share of its neurons that a token keeps in MLPs of a kind (routed, shared,
            dense), by kind; a kind that is not there keeps what is set.
        experts: the experts that a token goes to; None where the number is fixed.
        active: the share of its neurons whose activation is not zero, by kind, where up projections
            of others need not be known (:func:`active_are_measured`); all neurons count of a kind
            that is not there.
    """

    density: Mapping[str, float] = field(default_factory=dict)
    experts: float | None = None
    active: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Holds what a token of a model costs; all that neurons are chosen by is counted in full.

    Attributes:
        activated: parameters that it activates.
        decode_bytes: bytes of bf16 weights that are read to decode it, alone in its batch.
        step_flops: operations of a training step that the method needs.
    """

    activated: float
    decode_bytes: float
    step_flops: float


def neurons_are_fixed(config: Config) -> bool:
    """Returns whether each token keeps a number of neurons that is set."""
    mone = config.mone
    return not mone.enabled or mone.keep_ratio == 1 or RULES[mone.rule].fixed_count


def active_are_measured(config: Config) -> bool:
    """Returns whether up projections are needed of as many neurons as training finds active."""
    return any(mlp.up_of_active for mlp in gated_mlps(config.model, config.mone).values())


def experts_are_fixed(config: Config) -> bool:
    """Returns whether each token goes to a number of experts that is set."""
    return not config.model.num_experts or ROUTERS[config.model.router.kind].fixed_count


def usage_is_fixed(config: Config) -> bool:
    """Returns whether what a token uses of the model is set, not measured in training."""
    return neurons_are_fixed(config) and experts_are_fixed(config)


@dataclass(frozen=True)
class Activated:
    """Holds the parameters that a token activates, by convention (:mod:`.parameters`)."""

    gate_counted: float
    neurons_only: float
    all_neurons: float


def activated_of(config: Config, vocab_size: int, usage: Usage) -> Activated:
    """Returns what a token activates in a model whose tokens use what ``usage`` says.

    Args:
        config: of the model; what is fixed is taken from it.
        vocab_size: the unpadded size of the vocabulary.
        usage: what was measured.
    """
    counted = count_parameters(config.model, config.mone, vocab_size)
    gate_counted = float(counted.activated_gate_counted)
    neurons_only = float(counted.activated_neurons_only)
    all_neurons = float(counted.activated_all_neurons)
    for kind, mlp in gated_mlps(config.model, config.mone).items():
        kept: float = mlp.kept
        if kind in usage.density:
            kept = usage.density[kind] * mlp.width
        visited: float = mlp.visited
        if usage.experts is not None and kind == "routed":
            visited *= usage.experts / config.model.experts_per_token
        ups: float = mlp.width if mlp.chosen_by_up else kept
        if kind in usage.active and mlp.up_of_active:
            ups = usage.active[kind] * mlp.width
        gate_counted += visited * mlp.used(kept, ups) - mlp.visited * mlp.gate_counted
        neurons_only += visited * mlp.of_neurons(kept) - mlp.visited * mlp.neurons_only
        all_neurons += (visited - mlp.visited) * mlp.parameters
    return Activated(gate_counted, neurons_only, all_neurons)


def budget_of(config: Config, vocab_size: int, usage: Usage) -> Budget:
    """Returns what a token costs in a model whose tokens use what ``usage`` says.

    Args:
        config: of the model; what is fixed is taken from it.
        vocab_size: the unpadded size of the vocabulary.
        usage: what was measured.
    """
    model = config.model
    counted = count_parameters(model, config.mone, vocab_size)
    activated = activated_of(config, vocab_size, usage).gate_counted
    tokens = config.train.global_batch_size * config.train.seq_length
    more = activated - counted.activated_gate_counted
    # Of the embedding, one row is read, unless the output layer reads it whole.
    unread = 0 if model.tie_embeddings else counted.embedding - model.hidden_size
    return Budget(
        activated=activated,
        decode_bytes=_BYTES * (activated - unread),
        # Forward, and twice that backward, of 2 operations a weight.
        step_flops=flops_per_step(config, vocab_size).ideal + 6 * tokens * more,
    )
