"""Tokens sorted on one rank: as megatron-core's dispatchers sort them, to the last bit."""

from __future__ import annotations

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.config.load import compose
from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.kernels import compiled_cpu
from mone_megatron.model.transformer import transformer_config
from mone_megatron.mone.local_dispatch import LocalTokenDispatcher, can_dispatch_locally
from mone_megatron.mone.row_counts import RowCounts
from mone_megatron.parallel.groups import open_groups
from mone_megatron.testing.processes import Processes

SEQUENCE, BATCH = 10, 3
TOKENS = SEQUENCE * BATCH
EVEN = ("two_each", "an_expert_without")
# From 0.19 on the alltoall dispatcher counts on as many rows a token as experts it may choose.
MAPS = {"alltoall": EVEN, "allgather": (*EVEN, "uneven", "a_token_without", "none")}


def routing_map(name: str, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(TOKENS, experts, generator=generator)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if name == "none":
        return chosen
    if name in ("uneven", "a_token_without"):
        chosen = scores > 0.6
        if name == "a_token_without":
            chosen[4] = False
        return chosen
    if name == "an_expert_without":
        scores[:, 1] = -1.0
    return chosen.scatter_(1, scores.topk(2, dim=1).indices, True)


def megatron_dispatcher(kind: str, config: TransformerConfig) -> MoETokenDispatcher:
    classes = {"alltoall": MoEAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}
    experts = config.num_moe_experts
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return classes[kind](experts, list(range(experts)), config=config, pg_collection=groups)


def through(dispatcher: MoETokenDispatcher, config: TransformerConfig, name: str) -> list[Tensor]:
    """Rows, their tokens, counts, weights and output, and gradients of tokens and weights."""
    generator = torch.Generator().manual_seed(7)
    shape = (SEQUENCE, BATCH, config.hidden_size)
    tokens = torch.randn(shape, generator=generator).requires_grad_()
    chosen = routing_map(name, config.num_moe_experts)
    weights = torch.rand(chosen.shape, generator=generator) * chosen
    weights.requires_grad_()
    grad = torch.randn(shape, generator=generator)
    sent, probs = dispatcher.dispatch_preprocess(tokens, chosen, weights)
    rows, counts, row_weights = dispatcher.dispatch_postprocess(
        *dispatcher.token_dispatch(sent, probs)
    )
    of_rows = RowCounts(dispatcher).tokens_of_rows(len(rows))
    assert torch.equal(rows, tokens.flatten(0, 1)[of_rows])
    made = (rows * row_weights.unsqueeze(-1)).tanh()
    output = dispatcher.combine_postprocess(
        dispatcher.token_combine(dispatcher.combine_preprocess(made))
    )
    gradients = torch.autograd.grad(output, (tokens, weights), grad)
    return [x.detach() for x in (rows, of_rows, counts, row_weights, output, *gradients)]


def _both(kind: str, compiling: bool) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    with pytest.MonkeyPatch.context() as patch:
        if not compiling:
            patch.setattr(compiled_cpu, "_COMPILERS", ())
        compiled_cpu.compiled.cache_clear()
        try:
            return _through_both(kind)
        finally:
            compiled_cpu.compiled.cache_clear()


def _through_both(kind: str) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    config = compose(["experiment=tiny_moe", f"parallel.dispatcher={kind}"])
    open_groups(ParallelConfig(dispatcher=kind), TrainConfig(), timeout_seconds=300)
    transformer = transformer_config(
        config, dtype=torch.float32, on_cpu=True, sequence_parallel=False
    )
    theirs = megatron_dispatcher(kind, transformer)
    assert can_dispatch_locally(transformer, theirs)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ours = LocalTokenDispatcher(transformer, groups)
    return [
        (name, through(ours, transformer, name), through(theirs, transformer, name))
        for name in MAPS[kind]
    ]


@pytest.fixture(scope="module")
def one() -> Processes:
    with Processes(1) as processes:
        yield processes


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_rows_sums_and_gradients_are_those_of_megatron_core(
    one: Processes, kind: str, compiling: bool
) -> None:
    for name, ours, theirs in one.run(_both, kind, compiling)[0]:
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), name


def _local(overrides: tuple[str, ...], **changes: object) -> bool:
    config = compose(["experiment=tiny_moe", *overrides])
    open_groups(config.parallel, config.train, timeout_seconds=300)
    transformer = transformer_config(
        config, dtype=torch.float32, on_cpu=True, sequence_parallel=False
    )
    dispatcher = megatron_dispatcher(config.parallel.dispatcher, transformer)
    for name, value in changes.items():
        setattr(transformer, name, value)
    return can_dispatch_locally(transformer, dispatcher)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_expert_capacity_factor": 1.0},
        {"moe_shared_expert_overlap": True},
        {"moe_permute_fusion": True},
        {"use_cpu_initialization": False},
    ],
)
def test_what_is_not_a_plain_sort_is_left_to_megatron_core(
    one: Processes, changes: dict[str, object]
) -> None:
    assert one.run(_local, ())[0]
    assert not one.run(_local, (), **changes)[0]


def test_ranks_that_exchange_keep_megatron_cores_dispatcher() -> None:
    with Processes(2) as two:
        assert two.run(_local, ("parallel.expert=2",)) == [False, False]
