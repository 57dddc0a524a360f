"""Computes the matrix products of a training step and nothing else: what no step can be below.

Those are the projections of attention, the router, the experts (evenly used) and the output layer,
each with the products for both of its gradients, into memory that is there, in huge pages as ours.
Attention itself is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mone_megatron.config.schema import Config, ModelConfig
from mone_megatron.lab.benchmarks.peers.task import PeerTask
from mone_megatron.parallel.host_memory import keep_freed_memory
from mone_megatron.planning.attention import score_flops
from mone_megatron.planning.flops import forward_flops_per_token


def product_shapes(
    model: ModelConfig, tokens: int, vocab_size: int
) -> list[tuple[int, int, int, int]]:
    """Returns the products of a microbatch's forward pass.

    Args:
        model: with experts in every layer and grouped-query attention.
        tokens: of a microbatch.
        vocab_size: the tokenizer's, unpadded.

    Returns:
        Rows, inputs and outputs of a product, and how often it is computed.

    Raises:
        ValueError: for a model of another kind.
    """
    if not model.num_experts or model.first_dense_layers or model.attention != "gqa":
        raise ValueError("peers: knows models with experts in every layer and model.attention=gqa")
    hidden, layers = model.hidden_size, model.num_layers
    head = model.head_dim or hidden // model.num_attention_heads
    heads = model.num_attention_heads * head
    qkv = heads + 2 * model.num_query_groups * head
    rows = tokens * model.experts_per_token // model.num_experts
    ffn, experts = model.expert_ffn_hidden_size, layers * model.num_experts
    shapes = [
        (tokens, hidden, qkv, layers),
        (tokens, heads, hidden, layers),
        (tokens, hidden, model.num_experts, layers),
        (rows, hidden, 2 * ffn, experts),
        (rows, ffn, hidden, experts),
        (tokens, hidden, model.padded_vocab_size(vocab_size), 1),
    ]
    if shared := model.shared_expert_ffn_hidden_size:
        shapes += [(tokens, hidden, 2 * shared, layers), (tokens, shared, hidden, layers)]
    return shapes


def _check(config: Config, vocab_size: int, shapes: Sequence[tuple[int, int, int, int]]) -> None:
    """Refuses a model with products that :func:`product_shapes` does not know."""
    model, length = config.model, config.train.seq_length
    tokens = config.train.micro_batch_size * length
    counted = forward_flops_per_token(model, config.mone, length, vocab_size).realised
    wanted = tokens * (counted - score_flops(model, length))
    known = sum(2 * rows * inputs * outputs * times for rows, inputs, outputs, times in shapes)
    if known != wanted:
        raise ValueError(
            f"peers: the plan of this model counts other products ({wanted} operations a "
            f"microbatch) than are known here ({known}); use grouped-query attention and routed "
            "experts that divide the rows of a microbatch"
        )


class ProductsWork:
    """Computes the products of one step at a time."""

    parameters = 0

    def __init__(self, task: PeerTask) -> None:
        """Allocates the matrices, filled with random numbers."""
        config = task.config
        self.device = torch.device(config.device.kind)
        if self.device.type == "cpu":
            keep_freed_memory()  # as our steps do
        if config.device.threads:
            torch.set_num_threads(config.device.threads)
        bf16 = config.device.dtype == "bf16" or (
            config.device.dtype == "auto" and self.device.type == "cuda"
        )
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.microbatches = task.num_microbatches
        tokens = config.train.micro_batch_size * config.train.seq_length
        shapes = product_shapes(config.model, tokens, task.vocab_size)
        _check(config, task.vocab_size, shapes)
        self.products = [self._product(*shape) for shape in shapes]

    def _product(self, rows: int, inputs: int, outputs: int, times: int) -> Callable[[], None]:
        """Returns what computes one layer, forward and both gradients, so many times."""

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        x, weight, grad = random(rows, inputs), random(outputs, inputs), random(rows, outputs)
        output, grad_x, grad_weight = grad.clone(), x.clone(), weight.clone()

        def compute() -> None:
            for _ in range(times):
                torch.mm(x, weight.t(), out=output)
                torch.mm(grad, weight, out=grad_x)
                torch.mm(grad.t(), x, out=grad_weight)

        return compute

    def step(self) -> float:
        """Computes the products of a step; there is no loss."""
        for _ in range(self.microbatches):
            for product in self.products:
                product()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 0.0
