"""Whole tiny models: their weights, sizes, and selection wherever it is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from mone_megatron.config.load import compose
from mone_megatron.config.schema import (
    Config,
    MLAConfig,
    MoNEConfig,
    MTPConfig,
    NeuronBalanceConfig,
    ParallelConfig,
)
from mone_megatron.model.attention import SDPAttention
from mone_megatron.model.builder import build_gpt
from mone_megatron.model.initialize import global_name
from mone_megatron.model.norm import RMSNorm
from mone_megatron.model.transformer import transformer_config
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.layer import MicrobatchSources, MoNELayer
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS
from mone_megatron.mone.selection import NeuronSelector
from mone_megatron.parallel.groups import open_expert_sources, open_groups
from mone_megatron.parallel.megatron_compat.auxiliary_losses import (
    forget_layer_losses,
    layer_losses,
)
from mone_megatron.planning.parameters import count_parameters
from mone_megatron.testing.processes import Processes

VOCABULARY = 500  # padded to 512
MONE = MoNEConfig(
    enabled=True,
    apply_to=("routed", "shared", "dense"),
    balance=NeuronBalanceConfig(coeff=0.01),
)
# Everything a model can have, at once.
FULL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "dense_ffn_hidden_size": 64,
    "num_experts": 4,
    "expert_ffn_hidden_size": 32,
    "shared_expert_ffn_hidden_size": 48,
    "shared_expert_gate": True,
    "first_dense_layers": 1,
    "qkv_bias": True,
}


def tiny(mone: MoNEConfig | None = None, **model: Any) -> Config:
    config = compose(["experiment=tiny_moe", "train.seq_length=16"])
    return replace(
        config, model=replace(config.model, **model), mone=mone or MoNEConfig(enabled=False)
    )


def build(
    config: Config, sources: MicrobatchSources | None = None, vp_stage: int | None = None
) -> GPTModel:
    transformer = transformer_config(
        config,
        dtype=torch.float32,
        on_cpu=True,
        sequence_parallel=config.parallel.tensor > 1,
    )
    return build_gpt(
        config,
        transformer,
        vocab_size=VOCABULARY,
        sources=sources or MicrobatchSources((0,)),
        on_cpu=True,
        vp_stage=vp_stage,
    )


# Whole tensors from the parts of all ranks --------


@dataclass(frozen=True)
class Part:
    """One rank's part of a global tensor."""

    name: str
    value: Tensor
    # This rank's place along the axis that parallelism splits; axis None when it has all.
    axis: int | None
    stride: int
    rank: int
    size: int
    # The same for experts, along axis 0.
    expert_rank: int
    expert_size: int


def parts_of(model: GPTModel, values: dict[str, Tensor]) -> list[Part]:
    """``values``: by local parameter name, of the parameters' shapes."""
    expert_names = {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for name, _ in module.named_parameters(recurse=False)
    }
    parts = []
    for name, parameter in model.named_parameters():
        if name not in values:
            continue
        experts = expert_names.get(name)
        group = experts.tensor_group if experts else model.pg_collection.tp
        split = getattr(parameter, "tensor_model_parallel", False)
        parts.append(
            Part(
                global_name(model, name),
                values[name].detach().clone(),
                parameter.partition_dim if split else None,
                parameter.partition_stride if split else 1,
                group.rank(),
                group.size(),
                experts.expert_group.rank() if experts else 0,
                experts.expert_group.size() if experts else 1,
            )
        )
    return parts


def join(parts: list[Part]) -> dict[str, Tensor]:
    """The global tensors; replicas must be equal bit for bit."""
    by_place: dict[str, dict[tuple[int, int], Part]] = {}
    for part in parts:
        place = (part.expert_rank, part.rank if part.axis is not None else 0)
        known = by_place.setdefault(part.name, {}).setdefault(place, part)
        assert torch.equal(known.value, part.value), f"replicas of {part.name} differ"
    tensors = {}
    for name, places in by_place.items():
        first = next(iter(places.values()))
        experts = []
        for expert_rank in range(first.expert_size):
            if first.axis is None:
                experts.append(places[expert_rank, 0].value)
                continue
            shards = [places[expert_rank, rank].value for rank in range(first.size)]
            blocks = [shard.chunk(first.stride, dim=first.axis) for shard in shards]
            in_order = [block for stripe in zip(*blocks, strict=True) for block in stripe]
            experts.append(torch.cat(in_order, dim=first.axis))
        tensors[name] = torch.cat(experts) if first.expert_size > 1 else experts[0]
    return tensors


def weights_of(config: Config) -> list[Part]:
    stages = config.parallel.virtual_pipeline
    chunks = [build(config, vp_stage=stage if stages > 1 else None) for stage in range(stages)]
    return [part for chunk in chunks for part in parts_of(chunk, dict(chunk.named_parameters()))]


# Initial weights --------


def _weights_in_layout(config: Config) -> list[Part]:
    open_groups(config.parallel, config.train, timeout_seconds=300)
    return weights_of(config)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=2, expert_tensor=2),
        ParallelConfig(expert_tensor=2),
        ParallelConfig(expert=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
    ],
    ids=["tp2", "tp2_etp2", "etp2", "ep2", "pp2", "pp2_interleaved"],
)
def test_initial_weights_do_not_depend_on_the_layout(
    two_processes: Processes, parallel: ParallelConfig, tie_embeddings: bool
) -> None:
    config = tiny(**FULL, tie_embeddings=tie_embeddings)
    expected = join(weights_of(config))
    by_rank = two_processes.run(_weights_in_layout, replace(config, parallel=parallel))
    found = join([part for parts in by_rank for part in parts])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.usefixtures("one_process")
def test_initial_values() -> None:
    config = tiny(**{**FULL, "init_std": 0.05})
    model = build(config)
    residual = ("linear_proj.weight", "linear_fc2.weight", "down_weight")
    drawn = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert parameter.eq(1).all()
            assert parameter.ndim == 1
        elif name.endswith("bias"):
            assert parameter.eq(0).all()
        else:
            width = 0.05 / math.sqrt(2 * 4) if name.endswith(residual) else 0.05
            drawn[name] = parameter.std().item() / width
            assert parameter.mean().abs().item() < 6 * width / math.sqrt(parameter.numel())
    assert len(drawn) > 20
    for name, ratio in drawn.items():
        numel = dict(model.named_parameters())[name].numel()
        assert ratio == pytest.approx(1.0, abs=5 / math.sqrt(2 * numel)), name
    # No two tensors, experts or seeds alike.
    experts = model.decoder.layers[1].mlp.experts.gate_up_weight
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts, model.decoder.layers[2].mlp.experts.gate_up_weight)
    other = build(replace(config, train=replace(config.train, seed=99)))
    assert not torch.equal(experts, other.decoder.layers[1].mlp.experts.gate_up_weight)
    again = build(config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


# Sizes --------

LATENT: dict[str, Any] = {
    "attention": "mla",
    "num_query_groups": 4,
    "qk_norm": False,
    "mla": MLAConfig(0, 24, 16, 8, 20),
}
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "moe": ({}, False),
    "mone": ({}, True),
    "shared_expert": ({"shared_expert_ffn_hidden_size": 48}, True),
    "shared_expert_with_gate": (
        {"shared_expert_ffn_hidden_size": 48, "shared_expert_gate": True},
        False,
    ),
    "dense_first_layers": ({"first_dense_layers": 2}, True),
    "dense_only": ({"num_experts": 0}, True),
    "tied_embeddings": ({"tie_embeddings": True}, False),
    "qkv_bias": ({"qkv_bias": True}, False),
    "no_qk_norm": ({"qk_norm": False}, False),
    "qk_norm_over_all_heads": ({"qk_norm_scope": "all_heads"}, False),
    "head_dim": ({"head_dim": 24}, False),
    "mla": (LATENT, False),
    "mla_with_query_latent": (LATENT | {"mla": MLAConfig(12, 24, 16, 8, 20)}, True),
    "prediction": ({"mtp": MTPConfig(depth=2)}, True),
    "prediction_of_latent_attention": (LATENT | {"mtp": MTPConfig(depth=1)}, False),
    "prediction_by_dense_layers": ({"num_experts": 0, "mtp": MTPConfig(depth=1)}, False),
    "everything": (FULL | {"mtp": MTPConfig(depth=1)}, True),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_exact(name: str) -> None:
    changes, with_neurons = MODELS[name]
    config = tiny(MONE if with_neurons else None, **changes)
    model = build(config)
    expected = count_parameters(config.model, config.mone, VOCABULARY, padded=True)
    counted = {"embedding": 0, "output": 0, "norms": 0, "router": 0, "routed_experts": 0}
    counted |= {"shared_experts": 0, "dense_ffn": 0, "attention": 0, "prediction": 0}
    marks = {  # the first that is in the name
        "mtp.": "prediction",
        "norm": "norms",
        "embedding": "embedding",
        "output_layer": "output",
        "router": "router",
        "shared_experts": "shared_experts",
        "mlp.experts": "routed_experts",
        "mlp": "dense_ffn",
        "self_attention": "attention",
    }
    for parameter_name, parameter in model.named_parameters():
        kind = next(kind for mark, kind in marks.items() if mark in parameter_name)
        counted[kind] += parameter.numel()
    assert counted == {kind: getattr(expected, kind) for kind in counted}
    assert sum(parameter.numel() for parameter in model.parameters()) == expected.total


# Structure --------


@pytest.mark.usefixtures("one_process")
def test_modules_stand_where_the_config_puts_them() -> None:
    model = build(tiny(MONE, **FULL))
    dense, *moe = (layer.mlp for layer in model.decoder.layers)
    assert isinstance(dense, NeuronMLP)
    assert [type(mlp) for mlp in moe] == [MoNELayer] * 3
    assert all(isinstance(mlp.shared_experts, NeuronSharedExpert) for mlp in moe)
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, SDPAttention)
    assert isinstance(model.decoder.final_layernorm, RMSNorm)
    gates = [dense.neuron_gate, *(mlp.experts.neuron_gate for mlp in moe)]
    assert [gate.layer_number for gate in gates] == [1, 2, 3, 4]
    assert [mlp.shared_experts.neuron_gate.layer_number for mlp in moe] == [2, 3, 4]
    kept = [topk.kept for topk in model.modules() if isinstance(topk, NeuronSelector)]
    assert sorted(kept) == sorted([16] + [8] * 3 + [12] * 3)

    plain = build(tiny(**FULL))
    assert type(plain.decoder.layers[0].mlp) is MLP
    assert type(plain.decoder.layers[1].mlp.shared_experts) is SharedExpertMLP
    assert not any(isinstance(module, NeuronSelector) for module in plain.modules())
    routed_only = build(tiny(replace(MONE, apply_to=("routed",)), **FULL))
    assert sum(isinstance(module, NeuronSelector) for module in routed_only.modules()) == 3


# Training --------


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (2, 17), generator=generator)
    positions = torch.arange(16).expand(2, 16)
    return tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous()


def run(model: GPTModel) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients by parameter and masks by module of one forward and backward pass."""
    masks: dict[str, Tensor] = {}

    def remember(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *call: masks.__setitem__(name, call[2]))

    for name, module in model.named_modules():
        if isinstance(module, NeuronSelector):
            remember(name, module)
    tokens, positions, labels = batch()
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients, masks


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("apply_to", "changes"),
    [
        (("routed",), FULL),
        (("shared",), FULL),
        (("dense",), FULL),
        (("dense",), {"num_experts": 0}),
        (("routed", "shared", "dense"), FULL),
    ],
    ids=["routed", "shared", "dense", "dense_only_model", "all"],
)
def test_selection_trains_wherever_it_is_applied(
    apply_to: tuple[Any, ...], changes: dict[str, Any]
) -> None:
    mone = replace(MONE, apply_to=apply_to)
    config = tiny(mone, **changes)
    model = build(config).train()
    loss, gradients, masks = run(model)
    assert math.isfinite(loss)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    kinds = {"routed": "mlp.experts", "shared": "mlp.shared_experts", "dense": "mlp.neuron_gate"}
    for kind, mark in kinds.items():
        here = [name for name in masks if mark in name]
        assert bool(here) == (kind in apply_to), kind
        for name in here:
            kept = model.get_submodule(name).kept
            assert masks[name].sum(-1).eq(kept).all()
            assert kept * 4 == masks[name].shape[-1]
    # Neurons that no token keeps get no gradient; the kept ones do.
    for name, mask in masks.items():
        if "mlp.experts" in name:
            continue  # rows of several experts
        owner = name.removesuffix(".neuron_gate.selector")
        down = gradients[f"{owner}.linear_fc2.weight"]
        assert torch.equal(down.abs().amax(0) > 0, mask.any(0)), name
    values = layer_losses()[NEURON_BALANCE_LOSS]
    model_config = config.model
    dense_layers = model_config.first_dense_layers if model_config.num_experts else 4
    for layer, value in enumerate(values.tolist()):
        is_dense = layer < dense_layers
        selects = ("dense" in apply_to) if is_dense else bool({"routed", "shared"} & {*apply_to})
        assert (value > 0) == selects, layer


@pytest.mark.usefixtures("one_process")
def test_keeping_everything_equals_the_plain_model() -> None:
    keep_all = replace(MONE, keep_ratio=1.0)
    loss, gradients, masks = run(build(tiny(keep_all, **FULL)).train())
    plain_loss, plain_gradients, _ = run(build(tiny(**FULL)).train())
    assert not masks
    assert loss == plain_loss
    for name, gradient in plain_gradients.items():
        # SiLU's slope is rounded otherwise in the gated units' own function than by torch.
        atol = 1e-6 * float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=atol, msg=name)
    quarter, _, _ = run(build(tiny(MONE, **FULL)).train())
    assert quarter != plain_loss


SPLIT_MLPS = ("mlp.linear_fc1", "mlp.linear_fc2", "shared_experts.linear_fc")


def _run_in_layout(config: Config) -> tuple[float, list[Part], dict[str, Tensor], float]:
    open_groups(config.parallel, config.train, timeout_seconds=300)
    found = open_expert_sources(config.parallel)
    model = build(config, MicrobatchSources(found.microbatch_of_source, found.shared_group)).train()
    forget_layer_losses()
    loss, gradients, masks = run(model)
    wanted = {
        name: gradient
        for name, gradient in gradients.items()
        if any(mark in name for mark in SPLIT_MLPS)
    }
    balance = layer_losses()[NEURON_BALANCE_LOSS].sum().item()
    assert parallel_state.get_tensor_model_parallel_world_size() == config.parallel.tensor
    return loss, parts_of(model, wanted), masks, balance


@pytest.mark.usefixtures("one_process")
def test_shared_and_dense_selection_under_tensor_parallelism(two_processes: Processes) -> None:
    config = tiny(replace(MONE, apply_to=("shared", "dense")), **FULL)
    model = build(config).train()
    loss, gradients, masks = run(model)
    balance = layer_losses()[NEURON_BALANCE_LOSS].sum().item()

    split = replace(config, parallel=ParallelConfig(tensor=2, expert_tensor=2))
    by_rank = two_processes.run(_run_in_layout, split)
    for rank_loss, _, _, _ in by_rank:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
    for name, mask in masks.items():
        whole = torch.cat([rank_masks[name] for _, _, rank_masks, _ in by_rank], dim=-1)
        assert torch.equal(whole, mask), name
    # The ranks' parts of each balance loss add up.
    assert sum(part for *_, part in by_rank) == pytest.approx(balance, rel=1e-5)
    joined = join([part for _, parts, _, _ in by_rank for part in parts])
    assert joined
    for name, gradient in joined.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-7, msg=name)
