"""Counts parameters exactly, from the config alone.

There are two conventions for the parameters that one token activates, where neurons are selected
(an MLP of hidden size h and width f that keeps K neurons):

- gate counted (the default): h*f + 2*h*K, since the gate projection is computed in full; where
  the up projections of all neurons must be known before any is chosen (scores such as ``wina`` and
  ``abs_product``), they are counted in full, too: 2*h*f + h*K. Where those of neurons with an
  activation of zero need not be, their number is measured in training
  (:mod:`mone_megatron.planning.budget`), and before it all are counted;
- neurons only: 3*h*K.

Routed experts with a cheaper gate (``model.gate``) have its weights in the place of h*f: h*q + q*f
with ``low_rank``; with ``split`` q*f, and (h - q)*K for the up projection.

Everything that is not an unchosen expert or neuron is activated, embedding and output included
(the convention behind "A3B" of Qwen3-30B-A3B and 12.9B of Mixtral-8x7B). Layers of multi-token
prediction are trained, and activated by no token of a text that the model writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mone_megatron.config.schema import ModelConfig, MoNEConfig, MTPConfig
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gate import Gate, GateSize
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import count_kept
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.planning import attention as attention_of


@dataclass(frozen=True)
class ParameterCount:
    """Holds the parameters of one model, all layers and all ranks together, each counted once."""

    embedding: int
    # 0 when tied to the embedding.
    output: int
    # All projections, with the biases of queries, keys and values and the sinks if any.
    attention: int
    # RMSNorm weights: two a layer, the final one, and those of QK-norm or of MLA's latents.
    norms: int
    router: int
    routed_experts: int
    # With the weight of the shared expert's gate, if any.
    shared_experts: int
    # With queries, keys and experts of product-key layers.
    dense_ffn: int
    # The layers of multi-token prediction, whole.
    prediction: int
    # What one token uses; see the module's docstring for the two conventions.
    activated_gate_counted: int
    activated_neurons_only: int
    # What it would use if it kept all neurons of the MLPs that it visits.
    activated_all_neurons: int

    @property
    def total(self) -> int:
        """Returns the number of all parameters."""
        return (
            self.embedding
            + self.output
            + self.attention
            + self.norms
            + self.router
            + self.routed_experts
            + self.shared_experts
            + self.dense_ffn
            + self.prediction
        )

    @property
    def recorded(self) -> dict[str, int]:
        """Returns the numbers that ``run.json`` has under ``parameters``."""
        return {
            "total": self.total,
            "activated_gate_counted": self.activated_gate_counted,
            "activated_neurons_only": self.activated_neurons_only,
            "activated_all_neurons": self.activated_all_neurons,
        }


@dataclass(frozen=True)
class GatedMLP:
    """Describes one kind of SwiGLU MLP of a model, and how a token uses it."""

    hidden_size: int
    # Neurons in one MLP, and how many of them a token keeps (all without selection).
    width: int
    kept: int
    # MLPs of this kind in the model, and how many of them one token visits.
    count: int
    visited: int
    # How gate and up projections are computed.
    gate: Gate
    size: GateSize
    # Whether neurons are chosen by up projections, which are computed of all neurons then,
    chosen_by_up: bool = False
    # or of those alone whose activation is not zero, as many as training finds.
    up_of_active: bool = False

    @property
    def parameters(self) -> int:
        """Returns the number of weights of one MLP."""
        return self.gate.gate_parameters(self.size) + self.width * self._up_and_down

    @property
    def gate_counted(self) -> int:
        """Returns the number of weights that a token uses in one MLP: all that neurons are chosen
        by, which is the gate and for some scores the up projections, and the rest of kept neurons.
        """
        return int(self.used(self.kept, self.width if self.chosen_by_up else self.kept))

    def used(self, kept: float, ups: float) -> float:
        """Returns the weights that a token uses in one MLP, the gate in full.

        Args:
            kept: neurons that it keeps; their down projections are used.
            ups: neurons whose up projections it needs, the kept ones among them.
        """
        gate = self.gate.gate_parameters(self.size)
        return gate + ups * self.gate.up_inputs(self.size) + kept * self.hidden_size

    @property
    def neurons_only(self) -> int:
        """Returns the number of weights of the neurons that a token keeps in one MLP.

        What all its neurons share of a gate is none of theirs.
        """
        return int(self.of_neurons(self.kept))

    def of_neurons(self, kept: float) -> float:
        """Returns the weights of so many neurons alone."""
        return kept * (self.gate.gate_inputs(self.size) + self._up_and_down)

    @property
    def _up_and_down(self) -> int:
        """Returns the weights of a neuron's up and down projections."""
        return self.gate.up_inputs(self.size) + self.hidden_size


def count_parameters(
    model: ModelConfig, mone: MoNEConfig, vocab_size: int, *, padded: bool = False
) -> ParameterCount:
    """Counts the parameters of ``model``.

    ``vocab_size`` is the true size of the vocabulary (of the tokenizer, or ``model.vocab_size``).
    The embedding and output have its rows: this is the number that runs, plans, reports and
    exports show, and how published totals count. With ``padded`` they have the rows that training
    allocates, which are zero and see no loss: for counting memory.
    """
    rows = model.padded_vocab_size(vocab_size) if padded else vocab_size
    hidden = model.hidden_size
    moe_layers = moe_layers_of(model)

    embedding = rows * hidden
    output = 0 if model.tie_embeddings else rows * hidden
    attention = sum(matrix.parameters for matrix in attention_of.projections(model))
    attention += attention_of.sinks(model)
    norms = 2 * hidden + sum(norm.width for norm in attention_of.norms(model))
    router = ROUTERS[model.router.kind].parameters(model.router_settings)
    shared_gate = hidden if model.shared_expert_gate else 0

    mlps = gated_mlps(model, mone)
    every_token = (
        embedding
        + output
        + model.num_layers * (attention + norms)
        + hidden
        + moe_layers * (router + shared_gate)
    )
    product = product_key_layer(model)
    product_layers = model.num_layers if model.experts == "product_key" else 0
    every_token += product_layers * product.activated
    return ParameterCount(
        embedding=embedding,
        output=output,
        attention=model.num_layers * attention,
        norms=model.num_layers * norms + hidden,
        router=moe_layers * router,
        routed_experts=mlps["routed"].count * mlps["routed"].parameters,
        shared_experts=mlps["shared"].count * mlps["shared"].parameters + moe_layers * shared_gate,
        dense_ffn=mlps["dense"].count * mlps["dense"].parameters
        + product_layers * product.parameters,
        prediction=_prediction(model, mone, attention + norms, router + shared_gate),
        activated_gate_counted=every_token
        + sum(mlp.visited * mlp.gate_counted for mlp in mlps.values()),
        activated_neurons_only=every_token
        + sum(mlp.visited * mlp.neurons_only for mlp in mlps.values()),
        activated_all_neurons=every_token
        + sum(mlp.visited * mlp.parameters for mlp in mlps.values()),
    )


def _prediction(model: ModelConfig, mone: MoNEConfig, layer: int, routing: int) -> int:
    """Returns the parameters of the layers of multi-token prediction.

    Each joins the norms of a token's embedding and of the layer below by one matrix, and has a norm
    behind it.
    """
    later, hidden = prediction_layers(model), model.hidden_size
    mlps = gated_mlps(later, mone).values()
    return (
        later.num_layers * (layer + 2 * hidden * hidden + 3 * hidden)
        + moe_layers_of(later) * routing
        + sum(mlp.count * mlp.parameters for mlp in mlps)
    )


def prediction_layers(model: ModelConfig) -> ModelConfig:
    """Returns a model of the layers of multi-token prediction alone; of none it has no layers."""
    return replace(model, num_layers=model.mtp.depth, first_dense_layers=0, mtp=MTPConfig())


def gated_mlps(model: ModelConfig, mone: MoNEConfig) -> dict[str, GatedMLP]:
    """Returns the routed, shared and dense MLPs of ``model`` by kind; a kind that it lacks has a
    count of 0.
    """
    moe_layers = moe_layers_of(model)
    shared_layers = moe_layers if model.shared_expert_ffn_hidden_size else 0
    dense_layers = model.num_layers - moe_layers if model.experts == "grouped" else 0
    sizes = {
        "routed": (
            model.expert_ffn_hidden_size,
            moe_layers * model.num_experts,
            moe_layers * model.experts_per_token,
        ),
        "shared": (model.shared_expert_ffn_hidden_size, shared_layers, shared_layers),
        "dense": (model.dense_ffn_hidden_size, dense_layers, dense_layers),
    }
    selecting = mone.apply_to if mone.enabled else ()
    return {
        kind: GatedMLP(
            hidden_size=model.hidden_size,
            width=width,
            kept=count_kept(mone.keep_ratio, width) if kind in selecting else width,
            count=count,
            visited=visited,
            gate=GATES[model.gate if kind == "routed" else "full"],
            size=replace(model.gate_size, neurons=width),
            chosen_by_up=kind in selecting and _chosen_by_up(model, mone),
            up_of_active=kind in selecting and _up_of_active(model, mone),
        )
        for kind, (width, count, visited) in sizes.items()
    }


@dataclass(frozen=True)
class ProductKeyLayer:
    """Holds the weights of a layer of single-neuron experts by name, and how a token uses them."""

    weights: Mapping[str, int]
    # Experts of a token, and the weights of one: a row of each table.
    chosen: int
    expert: int

    @property
    def parameters(self) -> int:
        """Returns the number of weights of the layer."""
        return sum(self.weights.values())

    @property
    def activated(self) -> int:
        """Returns the weights that a token uses: queries and keys whole, and its experts."""
        return self.weights["query"] + self.weights["key"] + self.chosen * self.expert


def product_key_layer(model: ModelConfig) -> ProductKeyLayer:
    """Returns the weights of a layer with ``model.experts=product_key``."""
    keys, hidden = model.product_key, model.hidden_size
    weights = {
        "query": keys.heads * 2 * keys.key_dim * hidden,
        "key": 2 * keys.keys * keys.key_dim,
        "expert_in": keys.keys**2 * hidden,
        "expert_out": keys.keys**2 * hidden,
    }
    return ProductKeyLayer(weights, keys.heads * keys.experts_per_head, 2 * hidden)


def _chosen_by_up(model: ModelConfig, mone: MoNEConfig) -> bool:
    """Returns whether all up projections have to be known before a neuron is chosen.

    A rule that keeps what is not zero leaves out a neuron whose activation is zero by that alone,
    unless the up projection is rectified, too: then it has to know those of all that are left.
    """
    if RULES[mone.rule].keeps_nonzero and ACTIVATIONS[model.activation].up is None:
        return False
    return SCORES[mone.score].reads_up


def _up_of_active(model: ModelConfig, mone: MoNEConfig) -> bool:
    """Returns whether up projections of neurons without activation need not be known."""
    changes_up = ACTIVATIONS[model.activation].up is not None
    return RULES[mone.rule].needs_up_of_active(SCORES[mone.score], changes_up=changes_up)


def moe_layers_of(model: ModelConfig) -> int:
    """Returns the number of layers that have experts."""
    return model.num_layers - model.first_dense_layers if model.num_experts else 0
