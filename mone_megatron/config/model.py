"""Defines the group ``model``: the shape of the transformer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mone_megatron.config.attention import MLAConfig, RopeScalingConfig
from mone_megatron.config.group import Group
from mone_megatron.config.marks import Above, AtLeast, NameIn, Within
from mone_megatron.config.prediction import MTPConfig
from mone_megatron.config.product_key import ProductKeyConfig
from mone_megatron.config.router import RouterConfig
from mone_megatron.config.wording import is_multiple, near_divisors, near_multiples
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gate import GateSize
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.router import RouterSettings
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES

QKNormScope = Literal["head", "all_heads"]


@dataclass(frozen=True)
class ModelConfig(Group):
    """Shapes the model, a Qwen3-MoE-like GPT: GQA or MLA, RMSNorm, RoPE, SwiGLU, optional shared
    expert.
    """

    num_layers: Annotated[int, AtLeast(1)] = 4
    """Transformer layers."""
    hidden_size: Annotated[int, AtLeast(1)] = 128
    """h: the width of the residual stream."""
    num_attention_heads: Annotated[int, AtLeast(1)] = 4
    """Query heads."""
    attention: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or multi-latent attention (DeepSeek-V2), whose sizes are in
    `model.mla`."""
    num_query_groups: Annotated[int, AtLeast(1)] = 2
    """Key/value heads (GQA); equal to num_attention_heads for plain multi-head attention."""
    head_dim: Annotated[int, AtLeast(0)] = 0
    """The size of a head; 0 means hidden_size / num_attention_heads."""
    dense_ffn_hidden_size: Annotated[int, AtLeast(1)] = 512
    """The width of the dense SwiGLU layers (the leading ones, or all when num_experts is 0)."""
    num_experts: Annotated[int, AtLeast(0)] = 8
    """Routed experts of an MoE layer; 0 makes every layer dense."""
    experts_per_token: Annotated[int, AtLeast(1)] = 2
    """Routed experts that a token visits."""
    expert_ffn_hidden_size: Annotated[int, AtLeast(1)] = 128
    """f: the neurons in one routed expert."""
    shared_expert_ffn_hidden_size: Annotated[int, AtLeast(0)] = 0
    """The width of the expert every token visits; 0 for none."""
    shared_expert_gate: bool = False
    """A sigmoid gate on the shared expert (Qwen2-MoE)."""
    first_dense_layers: Annotated[int, AtLeast(0)] = 0
    """The first layers that are dense rather than MoE."""
    vocab_size: Annotated[int, AtLeast(0)] = 0
    """The size of the vocabulary; 0 takes the tokenizer's."""
    vocab_padding_multiple: Annotated[int, AtLeast(1)] = 128
    """The embedding is padded to a multiple of this, whatever the layout, so that checkpoints move;
    the padded rows are zero and the loss does not see them."""
    tie_embeddings: bool = False
    """The output layer shares the embedding's weights."""
    activation: Annotated[str, NameIn(ACTIVATIONS)] = "silu"
    """The activation of the gate projection in every MLP: `silu` is SwiGLU; `relu2` is the square
    of ReLU."""
    experts: Literal["grouped", "product_key"] = "grouped"
    """What the MLPs are: dense ones and `num_experts` routed experts (`grouped`), or in every layer
    experts of a single neuron that are found by product keys, without a router; their sizes are in
    `model.product_key`."""
    gate: Annotated[str, NameIn(GATES)] = "full"
    """How routed experts compute the gate projections, which choose among neurons: by a matrix as
    large as the up projection (`full`), by two of rank q (`low_rank`), or from the first q values
    of a token, the up projection from the others (`split`)."""
    gate_rank: Annotated[int, AtLeast(0)] = 0
    """q of a gate that has one; 0 means a quarter of hidden_size."""
    sparsity_loss: Annotated[str, NameIn(SPARSITY_LOSSES)] = "none"
    """A loss on the hidden values act(gate) * up of routed experts, of MoE and MoNE alike: `l1` is
    the mean over tokens of the sum of their absolute values, over a token's experts and kept
    neurons. Each layer adds it."""
    sparsity_coeff: Annotated[float, AtLeast(0)] = 0.0
    """The coefficient of the sparsity loss; with 0 it is only logged."""
    qk_norm: bool = True
    """RMSNorm on queries and keys, before RoPE."""
    qk_norm_scope: QKNormScope = "head"
    """The norm is over each head by itself (Qwen3), or over all query heads and all key heads
    together (OLMoE)."""
    attention_window: Annotated[int, AtLeast(0)] = 0
    """The number of tokens that attention sees, the query's own among them; 0 sees all before
    it."""
    full_attention_every: Annotated[int, AtLeast(0)] = 0
    """Every so many-th layer sees all tokens in spite of a window; 0 for none."""
    attention_sink: Literal["none", "zero", "learnable"] = "none"
    """A logit beside those of the tokens in each softmax of attention, which takes weight and gives
    nothing: 0 (`zero`), or learnt for each head (`learnable`)."""
    qkv_bias: bool = False
    """A bias on the query, key and value projections (Qwen2)."""
    norm_eps: Annotated[float, Above(0)] = 1e-6
    """What RMSNorm adds to the mean square."""
    rope_theta: Annotated[float, Above(0)] = 10000.0
    """The base of RoPE's frequencies."""
    init_std: Annotated[float, AtLeast(0)] = 0.02
    """The standard deviation of initial weights; residual outputs use init_std / sqrt(2 *
    num_layers)."""
    attention_dropout: Annotated[float, Within("[0, 1)")] = 0.0
    """Dropout of attention probabilities."""
    hidden_dropout: Annotated[float, Within("[0, 1)")] = 0.0
    """Dropout before each residual addition."""
    mtp: MTPConfig = field(default_factory=MTPConfig)
    product_key: ProductKeyConfig = field(default_factory=ProductKeyConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def gate_size(self) -> GateSize:
        """Returns the size of a routed expert, with the rank that its gate is computed by."""
        rank = self.gate_rank or max(self.hidden_size // 4, 1)
        return GateSize(self.hidden_size, self.expert_ffn_hidden_size, rank)

    @property
    def router_settings(self) -> RouterSettings:
        """Returns what a router reads: the sizes of a layer, and its options."""
        return RouterSettings(
            experts=self.num_experts,
            hidden=self.hidden_size,
            experts_per_token=self.experts_per_token,
            options=ROUTERS[self.router.kind].read_options(self.router.chosen_options),
        )

    @property
    def dense_layers(self) -> int:
        """Returns how many layers are dense: the first ones, or all of a model without experts."""
        return (
            min(self.first_dense_layers, self.num_layers) if self.num_experts else self.num_layers
        )

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Returns the rows of the embedding for a vocabulary of that size, whatever the layout."""
        multiple = self.vocab_padding_multiple
        return -(-vocab_size // multiple) * multiple

    def unread(self) -> Mapping[str, str]:
        """Returns the settings of what this model does not have."""
        unread: dict[str, str] = {}
        if self.num_experts < 1:
            of_experts = ("experts_per_token", "expert_ffn_hidden_size", "router")
            unread |= dict.fromkeys(of_experts, f"model.num_experts={self.num_experts}")
        if self.dense_layers < 1:
            unread["dense_ffn_hidden_size"] = "model.first_dense_layers=0"
        if self.experts == "product_key":
            unread["dense_ffn_hidden_size"] = "model.experts=product_key"
        else:
            unread["product_key"] = f"model.experts={self.experts}"
        if self.attention != "mla":
            unread["mla"] = f"model.attention={self.attention}"
        return unread

    def boundless(self) -> Collection[str]:
        """Returns all of them but the router, whose settings models without experts may share."""
        return self.unread().keys() - {"router"}

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        yield from self._attention()
        yield from self._latent_attention()
        yield from self._experts()
        yield from self._sparsity()
        yield from self._gate()
        yield from self._product_key()
        if self.num_experts > 0:
            yield from self.router.rules_with_experts(self.num_experts, self.experts_per_token)

    def _attention(self) -> Iterator[str]:
        if self.attention == "gqa":
            head = self.head_dim or self.hidden_size // max(self.num_attention_heads, 1)
            if self.head_dim == 0 and not is_multiple(self.hidden_size, self.num_attention_heads):
                yield (
                    f"model.hidden_size: {self.hidden_size} is not a multiple of "
                    f"model.num_attention_heads={self.num_attention_heads}; use "
                    f"{near_multiples(self.hidden_size, self.num_attention_heads)}, or "
                    "model.head_dim"
                )
            elif head % 2:
                yield (
                    f"model.head_dim: {head} is odd and RoPE turns pairs; "
                    f"use {near_multiples(head, 2)}"
                )
        if not is_multiple(self.num_attention_heads, self.num_query_groups):
            yield (
                f"model.num_query_groups: {self.num_query_groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}; "
                f"use {near_divisors(self.num_attention_heads, self.num_query_groups)}"
            )
        if self.full_attention_every and not self.attention_window:
            yield (
                f"model.full_attention_every: {self.full_attention_every} has no effect without a "
                "window; use 0, or set model.attention_window"
            )
        if self.full_attention_every == 1:
            yield (
                "model.full_attention_every: 1 leaves no layer with the window; use 2 or more, or "
                "model.attention_window=0"
            )
        if self.qk_norm_scope == "all_heads" and not self.qk_norm:
            yield (
                "model.qk_norm_scope: all_heads has no effect with model.qk_norm=false; use head, "
                "or model.qk_norm=true"
            )

    def _latent_attention(self) -> Iterator[str]:
        """Yields what is wrong with the fields that multi-latent attention does not read."""
        if self.attention != "mla":
            if self.rope_scaling.type != "none":
                yield (
                    f"model.rope_scaling.type: {self.rope_scaling.type} needs model.attention=mla; "
                    "use model.rope_scaling.type=none"
                )
            return
        if self.num_query_groups != self.num_attention_heads:
            yield (
                f"model.num_query_groups: {self.num_query_groups} with model.attention=mla, where "
                f"each head has its own keys; use {self.num_attention_heads}, as "
                "model.num_attention_heads"
            )
        if self.head_dim:
            yield (
                f"model.head_dim: {self.head_dim} is not read with model.attention=mla; use 0, and "
                "model.mla.qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
            )
        if self.qk_norm:
            yield (
                "model.qk_norm: true with model.attention=mla, which normalises its latents "
                "instead; use model.qk_norm=false"
            )
        if self.qkv_bias:
            yield (
                "model.qkv_bias: true with model.attention=mla, whose projections have no bias; "
                "use model.qkv_bias=false"
            )

    def _gate(self) -> Iterator[str]:
        gate = GATES[self.gate]
        if not gate.ranked and self.gate_rank:
            yield (
                f"model.gate_rank: {self.gate_rank} has no effect with model.gate={self.gate}; use "
                "0, or a gate that has a rank, such as low_rank"
            )
        if not gate.ranked:
            return
        if self.num_experts < 1:
            yield (
                f"model.gate: {self.gate} is the gate of routed experts, and model.num_experts is "
                "0; use full"
            )
        elif self.hidden_size > 0 and (problem := gate.problem(self.gate_size)):
            yield f"model.gate_rank: {self.gate_size.rank} {problem}"

    def _product_key(self) -> Iterator[str]:
        if self.experts != "product_key":
            return
        if self.num_experts > 0:
            yield (
                f"model.num_experts: {self.num_experts} with model.experts=product_key, whose "
                "experts are no routed ones; use 0, and model.product_key.keys for their number"
            )
        if self.mtp.depth:
            yield (
                f"model.mtp.depth: {self.mtp.depth} with model.experts=product_key is not "
                "supported; use 0"
            )
        if ACTIVATIONS[self.activation].up is not None:
            yield (
                f"model.activation: {self.activation} changes the up projection, which the experts "
                "of model.experts=product_key do not have; use silu or relu"
            )

    def _sparsity(self) -> Iterator[str]:
        lossless = SPARSITY_LOSSES[self.sparsity_loss].function is None
        if lossless and self.sparsity_coeff:
            yield (
                f"model.sparsity_coeff: {self.sparsity_coeff:g} has no effect with "
                f"model.sparsity_loss={self.sparsity_loss}; name a loss such as l1, or use 0"
            )
        if not lossless and self.num_experts < 1:
            yield (
                f"model.sparsity_loss: {self.sparsity_loss} is a loss on routed experts, and "
                "model.num_experts is 0; use none"
            )

    def _experts(self) -> Iterator[str]:
        if self.num_experts > 0:
            if self.experts_per_token > self.num_experts:
                yield (
                    f"model.experts_per_token: {self.experts_per_token} is more than "
                    f"model.num_experts={self.num_experts}; use {self.num_experts} or fewer"
                )
            if self.first_dense_layers >= self.num_layers > 0:
                yield (
                    f"model.first_dense_layers: {self.first_dense_layers} leaves no MoE layer of "
                    f"model.num_layers={self.num_layers}; use {self.num_layers - 1} or fewer, or "
                    "model.num_experts=0"
                )
        else:
            if not ROUTERS[self.router.kind].stock:
                yield (
                    f"model.router.kind: {self.router.kind} routes to experts, and "
                    "model.num_experts is 0; use topk"
                )
            if self.first_dense_layers:
                yield (
                    f"model.first_dense_layers: {self.first_dense_layers} has no effect with "
                    "model.num_experts=0, where every layer is dense; use 0"
                )
            if self.shared_expert_ffn_hidden_size:
                yield (
                    f"model.shared_expert_ffn_hidden_size: {self.shared_expert_ffn_hidden_size} "
                    "needs experts, and model.num_experts=0; use 0"
                )
        if self.shared_expert_gate and not self.shared_expert_ffn_hidden_size:
            yield (
                "model.shared_expert_gate: there is no shared expert to gate; "
                "set model.shared_expert_ffn_hidden_size, or model.shared_expert_gate=false"
            )
