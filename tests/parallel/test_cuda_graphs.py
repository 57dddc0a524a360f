"""Attention as CUDA graphs: what is in one, when, and that the rest of a step goes on around it.

Transformer Engine's ``make_graphed_callables`` needs a GPU. In its place stands one that keeps its
promises without: inputs and outputs on the same memory each time, nothing but the tensors of the
capture as inputs, hooks of modules not called, and a warm-up that runs every hook of a gradient.
megatron-core's part (which layers, which arguments, what follows the graph) is its own.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import cuda_graphs as upstream
from megatron.core.transformer import transformer_layer
from torch import Tensor, nn

from mone_megatron.config.checks import cuda_graphs as checks
from mone_megatron.config.checks import hardware
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.parallel import cuda_graphs
from mone_megatron.planning.unmodelled import unmodelled
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches
from mone_megatron.train.resume.random_state import random_state, set_random_state

GRAPHS = "megatron.transformer.cuda_graph_impl=transformer_engine"
WARM_UP = 2


@dataclass
class _Graph:
    """One layer's: what it reads and writes is the same memory in each replay."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    weights: tuple[nn.Parameter, ...] = ()
    written: tuple[Tensor, ...] = ()
    computed: tuple[Tensor, ...] = ()
    replays: int = 0

    def run(self) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, self.inputs[1:], strict=True))
        # Transformer Engine's causal attention reads no mask; ours takes one for documents.
        named["attention_mask"] = None
        with torch.enable_grad():
            outputs: tuple[Tensor, ...] = self.layer._te_cuda_graph_capture(self.inputs[0], **named)
        return outputs

    def capture(self) -> None:
        surface = [*self.inputs, *self.layer.parameters()]
        leaves = [tensor for tensor in surface if tensor.requires_grad]
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        outputs = self.run()
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        used = [leaf for leaf in leaves if leaf.grad is not None]
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad
        self.weights = tuple(leaf for leaf in used if isinstance(leaf, nn.Parameter))
        self.written = tuple(output.detach().clone() for output in outputs)

    def __call__(self, hidden: Tensor, **named: Any) -> tuple[Tensor, ...]:
        arguments = [hidden, *(named[name] for name in self.names)]
        return _Replay.apply(self, len(arguments), *arguments, *self.weights)

    def reset(self) -> None:
        self.computed = ()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for static, given in zip(graph.inputs, tensors[:count], strict=True):
                assert static.shape == given.shape
                assert static.dtype == given.dtype
                static.copy_(given)
        graph.computed = graph.run()
        graph.replays += 1
        for static, output in zip(graph.written, graph.computed, strict=True):
            static.copy_(output.detach())
        ctx.graph, ctx.count = graph, count
        return tuple(static.detach() for static in graph.written)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        graph = ctx.graph
        leaves = [tensor for tensor in (*graph.inputs, *graph.weights) if tensor.requires_grad]
        found = iter(torch.autograd.grad(graph.computed, leaves, grads))
        surface = (*graph.inputs, *graph.weights)
        return (None, None, *(next(found) if one.requires_grad else None for one in surface))


@dataclass
class _Captures:
    """Stands in for Transformer Engine's function, and keeps what it made."""

    graphs: list[_Graph] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def __call__(
        self,
        layers: tuple[nn.Module, ...],
        sample_args: list[tuple[Tensor, ...]],
        *,
        sample_kwargs: list[dict[str, Tensor]],
        num_warmup_iters: int,
        _order: list[int],
        **more: Any,
    ) -> tuple[_Graph, ...]:
        self.order = _order
        assert num_warmup_iters >= 1
        for layer, arguments, named in zip(layers, sample_args, sample_kwargs, strict=True):
            assert not layer._forward_pre_hooks
            assert not layer._forward_hooks
            assert not layer._backward_hooks
            self.graphs.append(_Graph(layer, (*arguments, *named.values()), tuple(named)))
        # Gradients of layers whose buffers are the same are not kept: one layer after the other.
        for graph in self.graphs:
            graph.inputs = tuple(
                one.detach().clone().requires_grad_(one.requires_grad) for one in graph.inputs
            )
            graph.capture()
        return tuple(self.graphs)


@contextmanager
def _transformer_engine() -> Iterator[_Captures]:
    """Lets megatron-core believe that a Transformer Engine is there, when it asks for graphs."""
    captures = _Captures()
    packages = {
        name: types.ModuleType(name)
        for name in ("transformer_engine", "transformer_engine.pytorch")
    }
    for name, package in packages.items():
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "_overlaps", lambda config, resources: iter(()))
        patch.setattr(checks, "graphs_attention", lambda megatron: False)
        patch.setattr(upstream, "HAVE_TE_GRAPHS", True)
        patch.setattr(upstream, "make_graphed_callables", captures, raising=False)
        for module in (upstream, transformer_layer, cuda_graphs):
            patch.setattr(module, "is_te_min_version", lambda version: True)
        for name, package in packages.items():
            patch.setitem(sys.modules, name, package)
        yield captures


def _trained(overrides: list[str], *, graphs: bool) -> tuple[list[float], list[Any]]:
    """Returns the losses and gradient norms of some steps, and an evaluation's; and what ran."""
    overlaps = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    asked = [GRAPHS, f"megatron.transformer.cuda_graph_warmup_steps={WARM_UP}"] if graphs else []
    with _transformer_engine() as captures:
        trainer = build_trainer(
            ["experiment=tiny_mone", "optim.warmup_steps=0", "optim.lr=0.01",
             # Two microbatches of a rank at the least: a graph is replayed for each.
             "train.global_batch_size=4", "train.micro_batch_size=1", "model.num_layers=2",
             # Several buckets: what waits for one leaves the others under way.
             "megatron.ddp.bucket_size=4000", *overlaps, *overrides, *asked],
            data_fingerprint="random tokens",
            dtype=torch.bfloat16,
        )  # fmt: skip
        batches = random_batches(trainer)
        numbers, replays = [], []
        for _ in range(WARM_UP + 3):
            result = trainer.stepper.train(batches)
            numbers += [result.loss, result.grad_norm]
            replays.append(sum(graph.replays for graph in captures.graphs))
        numbers.append(trainer.stepper.evaluate(iter(batches), 1))
        replays.append(sum(graph.replays for graph in captures.graphs))
        weights = [
            tuple(sorted({name for weight in graph.weights
                          for name, other in graph.layer.named_parameters() if other is weight}))
            for graph in captures.graphs
        ]  # fmt: skip
        waited = {
            id(weight)
            for graph in captures.graphs
            for _, (module,) in graph.layer.cuda_graph_manual_hooks
            for weight in module.parameters(recurse=False)
        }
        waits = [id(weight) in waited for graph in captures.graphs for weight in graph.weights]
        trainer.stepper.drop_graphs()
    dist.barrier()
    return numbers, [replays, len(batches), captures.order, weights, waits]


LAYOUTS: dict[str, list[str]] = {
    "mone": [],
    "ep2": ["parallel.expert=2"],
    "tp2": ["parallel.tensor=2", "parallel.expert=2"],
    "dense_layer_and_shared": [
        "model.first_dense_layers=1",
        "model.shared_expert_ffn_hidden_size=64",
    ],
    # No experts: what selects is the MLP of each layer.
    "dense": [
        "model.num_experts=0",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
        "mone.apply_to=[dense]",
    ],
    "latent": ["model.attention=mla", "model.qk_norm=false", "model.num_query_groups=4"],
    "sink_and_norms": [
        "model.attention_sink=learnable",
        "model.qk_norm=true",
        "model.qk_norm_scope=all_heads",
    ],
    "without_overlap": [
        "parallel.overlap_grad_reduce=false",
        "parallel.overlap_param_gather=false",
    ],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_as_it_would_without(two_processes: Processes, name: str) -> None:
    overrides = LAYOUTS[name]
    without = two_processes.run(_trained, overrides, graphs=False)
    graphed = two_processes.run(_trained, overrides, graphs=True)
    for (expected, _), (numbers, ran) in zip(without, graphed, strict=True):
        assert numbers == expected
        replays, microbatches, order, weights, waits = ran
        each = 2 * microbatches
        # After the steps to warm up in each step, and not in evaluation.
        assert replays == [0] * WARM_UP + [each, 2 * each, 3 * each, 3 * each]
        assert order == [1, -1]
        assert len(weights) == 2
        # What a hook waits for when weights are gathered meanwhile.
        assert set(waits) == {name != "without_overlap"}
        for names in weights:
            assert names
            assert all(name.startswith(("input_layernorm.", "self_attention.")) for name in names)


def _looked_after(what: str) -> str:
    """Returns what is said of a change that graphs would not see."""
    with _transformer_engine():
        trainer = build_trainer(
            ["experiment=tiny_moe", "train.global_batch_size=4", "model.num_layers=2", GRAPHS,
             "megatron.transformer.cuda_graph_warmup_steps=1"],
            data_fingerprint="random tokens",
            dtype=torch.bfloat16,
        )  # fmt: skip
        batches, graphs = random_batches(trainer), trainer.stepper.graphs
        assert graphs is not None
        attention = graphs.layers[-1].self_attention
        early = what.startswith("early")
        for _ in range(1 if early else 3):
            trainer.stepper.train(batches)
        if what.endswith("hook"):
            attention.linear_proj.register_forward_hook(lambda *_: None)
        elif what == "hook on a layer":
            graphs.layers[0].register_forward_pre_hook(lambda *_: None)
        else:
            weight = attention.linear_proj.weight
            weight.data = weight.data.clone()
        with pytest.raises(RuntimeError) as caught:
            trainer.stepper.train(batches)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("early hook", "a hook on RowParallelLinear would not be called"),
        ("late hook", "a hook on RowParallelLinear would not be called"),
        ("hook on a layer", "a hook on TransformerLayer would not be called"),
        ("moved weight", "weights of attention have moved in memory"),
    ],
)
def test_what_a_graph_would_not_see_ends_the_run(
    two_processes: Processes, what: str, says: str
) -> None:
    for said in two_processes.run(_looked_after, what):
        assert said.startswith("megatron.transformer.cuda_graph_impl: ")
        assert says in said


# A value of each key that graphs cannot be made with.
IN_THE_WAY = {
    "device.kind": "cpu",
    "device.dtype": "fp32",
    "model.attention_dropout": "0.1",
    "model.hidden_dropout": "0.1",
    "data.reset_attention": "true",
    "train.recompute": "selective",
    "parallel.pipeline": "2",
    "parallel.context": "2",
    "model.mtp.depth": "1",
}


def _problems(*overrides: str, engine: bool = True) -> list[str]:
    config = compose(["experiment=tiny_mone", "device=cuda", GRAPHS, *overrides])
    try:
        validate(config, world_size=2, num_devices=2, have_transformer_engine=engine)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_it_is_taken_on_a_gpu_with_transformer_engine_alone() -> None:
    assert _problems() == []
    assert _problems("parallel.tensor=2", "parallel.expert=2", "model.attention_sink=zero") == []
    (line,) = _problems(engine=False)
    assert line == (
        "megatron.transformer.cuda_graph_impl: Transformer Engine makes the graphs, and is not "
        "installed; leave it out"
    )


@pytest.mark.parametrize("one", checks.REFUSALS, ids=lambda one: one.key)
def test_what_a_graph_cannot_be_made_with_is_refused(one: checks.Refusal) -> None:
    found = [
        line
        for line in _problems(f"{one.key}={IN_THE_WAY[one.key]}")
        if line.startswith(f"{one.key}: ") and line.endswith("or leave the graphs out")
    ]
    assert len(found) == 1
    assert f"use {one.fix}" in found[0]
    assert one.why in found[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cuda_graph_impl=local", "use transformer_engine, or leave it out"),
        ("cuda_graph_warmup_steps=0", "use 1 or more"),
        ("cuda_graph_scope=attn", "megatron.transformer.cuda_graph_impl sets it"),
        ("cuda_graph_retain_backward_graph=true", "graphs of attention only"),
        ("cuda_graph_use_single_mempool=true", "graphs of attention only"),
        ("external_cuda_graph=true", "graphs of attention only"),
        ("softmax_scale=0.5", "it was not tried with megatron.transformer.cuda_graph_impl"),
        ("cpu_offloading=true", "it was not tried with megatron.transformer.cuda_graph_impl"),
        ("rotary_interleaved=true", "it was not tried with megatron.transformer.cuda_graph_impl"),
    ],
)
def test_what_else_is_refused_of_megatron_cores_fields(override: str, says: str) -> None:
    found = _problems(f"megatron.transformer.{override}")
    assert found
    assert all(
        line.startswith(f"megatron.transformer.{override.split('=')[0]}: ") for line in found
    )
    assert any(says in line for line in found)


def test_experts_are_outside_of_a_graph_and_may_be_set() -> None:
    assert _problems("megatron.transformer.moe_permute_fusion=false") == []
    assert _problems("megatron.transformer.moe_expert_capacity_factor=2") == []


def test_the_rest_of_the_group_needs_graphs_that_are_on() -> None:
    steps = "megatron.transformer.cuda_graph_warmup_steps"
    (line,) = _problems("megatron.transformer.cuda_graph_impl=none", f"{steps}=4")
    assert line.startswith(f"{steps}: it is read beside megatron.transformer.cuda_graph_impl only")


def test_plans_and_runs_say_it() -> None:
    config = compose(["experiment=tiny_mone", "device=cuda", GRAPHS])
    assert unmodelled(config) == ["megatron.transformer.cuda_graph_impl"]
    # It changes how something is computed, and not what: exports take the model.
    assert config.megatron.changing() == []
    assert "made after 3 steps of this run" in cuda_graphs.describe(config)


@pytest.mark.usefixtures("one_process")
def test_random_states_that_a_graph_holds_are_saved_as_others_and_go_on_in_place() -> None:
    tracker = get_cuda_rng_tracker()
    plain = {name: state.clone() for name, state in tracker.get_states().items()}
    assert plain
    held = {name: torch.Generator().manual_seed(7) for name in plain}
    for name, generator in held.items():
        generator.set_state(plain[name])
    tracker.set_states(dict(held))
    saved = random_state()
    assert all(torch.equal(saved["tracker"][name], plain[name]) for name in plain)
    drawn = {name: torch.rand(3, generator=generator) for name, generator in held.items()}
    set_random_state(saved)
    assert all(tracker.get_states()[name] is held[name] for name in held)
    for name, generator in held.items():
        assert torch.equal(torch.rand(3, generator=generator), drawn[name])
    # And a checkpoint of a run with graphs is gone on with without.
    tracker.set_states(plain)
    set_random_state(saved)
    assert all(isinstance(state, torch.Tensor) for state in tracker.get_states().values())
