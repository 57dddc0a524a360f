"""Draws initial weights by the seed, the parameter's global name and the expert's index.

Never of the layout. megatron-core draws from one stream per rank in construction order, so
pipeline and expert parallelism change its initial weights, and no two layouts can be compared.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.product_key import ProductKeyExperts
from mone_megatron.mone.routers import MethodRouter
from mone_megatron.parallel.megatron_compat.checkpoint_forms import stored_name

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Projections back into the residual stream, scaled down by depth.
_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "down_weight", "expert_out_weight")


def global_name(model: GPTModel, name: str) -> str:
    """Returns a parameter's name with its layer's number in the whole model (from 0)."""
    match = _LAYER.match(name)
    if match:
        layer = model.decoder.layers[int(match.group(1))]
        return f"decoder.layers.{layer.layer_number - 1}.{name[match.end() :]}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return stored_name(name)


def _generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    # torch seeds are signed 64-bit.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _fill_experts(
    parameter: Tensor, experts: GroupedExperts, name: str, seed: int, std: float
) -> None:
    dim = parameter.partition_dim - 1  # type: ignore[attr-defined]
    ranks, rank = experts.tensor_group.size(), experts.tensor_group.rank()
    first = experts.expert_group.rank() * experts.num_local_experts
    shape = list(parameter.shape[1:])
    shape[dim] *= ranks
    for local in range(experts.num_local_experts):
        whole = _draw(tuple(shape), std, _generator(seed, name, first + local))
        parameter[local].copy_(whole.chunk(ranks, dim=dim)[rank])


def _fill(
    parameter: Tensor,
    name: str,
    seed: int,
    std: float,
    tp_rank: int,
    tp_size: int,
    vocab_size: int,
) -> None:
    """Draws the whole tensor and takes this rank's part."""
    shape = list(parameter.shape)
    split = getattr(parameter, "tensor_model_parallel", False)
    dim = parameter.partition_dim if split else 0  # type: ignore[attr-defined]
    if split:
        shape[dim] *= tp_size
    whole = _draw(tuple(shape), std, _generator(seed, name, None))
    if name in _VOCABULARY:
        # Padding rows stand for no token: nothing reads them, and they stay zero, so that they
        # need not be kept where the vocabulary has its true size (Hugging Face).
        whole[vocab_size:] = 0
    if split:
        # Stride 2: each rank holds its part of gate, then its part of up.
        stride = parameter.partition_stride  # type: ignore[attr-defined]
        parts = [block.chunk(tp_size, dim=dim)[tp_rank] for block in whole.chunk(stride, dim=dim)]
        whole = torch.cat(parts, dim=dim)
    parameter.copy_(whole)


@torch.no_grad()
def initialize_weights(model: GPTModel, *, seed: int, std: float, vocab_size: int) -> None:
    """Fills the parameters of one model chunk in place.

    Norm weights are 1, biases and the rows that pad the vocabulary 0, all else normal with ``std``,
    or ``std / sqrt(2 * num_layers)`` for projections into the residual stream. Gates of experts
    that are not the usual one, routers and product keys say what theirs begin with.

    Args:
        model: a GPTModel, not yet wrapped.
        seed: ``train.seed``.
        std: ``model.init_std``.
        vocab_size: the tokenizer's number of entries, unpadded.
    """
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    tp_group = model.pg_collection.tp
    experts = {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for name, _ in module.named_parameters(recurse=False)
    }
    key_std = {
        f"{prefix}.key_weight": module.sizes.key_std
        for prefix, module in model.named_modules()
        if isinstance(module, ProductKeyExperts)
    }
    initial = {
        f"{prefix}.{name}": weight.initial
        for prefix, module in model.named_modules()
        if isinstance(module, MethodRouter)
        for name, weight in module.method_weights.items()
        if weight.initial is not None
    }
    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        if local_name in initial:
            parameter.fill_(initial[local_name])
        elif "norm" in name.rsplit(".", 2)[-2]:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            width = residual_std if name.endswith(_RESIDUAL) else std
            if local_name in experts:
                module = experts[local_name]
                weight = module.gate_weights.get(name.rpartition(".")[2])
                if weight is not None:
                    width = weight.std if weight.absolute else weight.std * std
                _fill_experts(parameter, module, name, seed, width)
            else:
                width = key_std.get(local_name, width)
                place = tp_group.rank(), tp_group.size()
                _fill(parameter, name, seed, width, *place, vocab_size)
