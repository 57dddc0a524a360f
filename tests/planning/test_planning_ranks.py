"""Memory of each rank against real tiny runs.

Weights, gradients, masters and moments exactly, activations within 2% of what torch saves
(10% where experts are unevenly loaded).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_ranks import most_passes_in_flight, saved_bytes, sent_in_a_step, state_bytes

from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.planning import activations, count_parameters
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.communication import stage_traffic
from mone_megatron.planning.layout import place_of
from mone_megatron.planning.memory import passes_in_flight
from mone_megatron.planning.shards import (
    LocalParameter,
    StateBytes,
    chunk_parameters,
    lay_out,
    layer_kinds,
    prediction_kinds,
    stage_state,
)
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import VOCABULARY

SHAPE = [
    "experiment=tiny_mone",
    "model.first_dense_layers=1",
    "model.shared_expert_ffn_hidden_size=64",
    "model.shared_expert_gate=true",
    "model.qkv_bias=true",
    "train.micro_batch_size=1",
    "train.seq_length=16",
    # One microbatch on each of four ranks.
    "train.global_batch_size=4",
]
LATENT = [
    "model.attention=mla", "model.num_query_groups=4", "model.qk_norm=false",
    "model.qkv_bias=false", "model.mla.kv_lora_rank=24", "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_rope_head_dim=8", "model.mla.v_head_dim=20",
]  # fmt: skip
LAYOUTS_OF_2 = [
    [],
    ["parallel.tensor=2", *LATENT, "model.mla.q_lora_rank=12"],
    ["parallel.tensor=2", "model.qk_norm_scope=all_heads"],
    ["parallel.tensor=2", "parallel.expert_tensor=2", "model.tie_embeddings=true"],
    ["parallel.tensor=2", "parallel.expert_tensor=2", "model.gate=low_rank"],
    ["parallel.expert=2", "parallel.distributed_optimizer=false"],
    ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.tie_embeddings=true"],
    ["parallel.expert=2", "model.router.kind=autonomy", "model.router.rank=5"],
    [
        "parallel.tensor=2",
        "model.router.kind=routing_free",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
    ],
    ["parallel.pipeline=2", "model.mtp.depth=2"],
    ["parallel.tensor=2", "model.mtp.depth=1", "model.num_experts=0",
     "model.first_dense_layers=0", "model.shared_expert_ffn_hidden_size=0",
     "model.shared_expert_gate=false", "mone.enabled=false"],
]  # fmt: skip
LAYOUTS_OF_4 = [
    [],
    ["parallel.expert=2"],
    ["parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"],
    ["parallel.pipeline=2", "parallel.expert=2", "model.tie_embeddings=true"],
]


def predicted(overrides: Sequence[str], world_size: int, *, bf16: bool) -> list[StateBytes]:
    config = compose(overrides)
    layout = validate(config, world_size=world_size)
    found = []
    for rank in range(world_size):
        place = place_of(rank, config.parallel, layout)
        stage = stage_state(
            config, layout, VOCABULARY, place.pipeline, weight_bytes=2 if bf16 else 4
        )
        found.append(stage.of(place, config.parallel.context))
    return found


def local_elements(overrides: Sequence[str], world_size: int) -> list[int]:
    config = compose(overrides)
    layout = validate(config, world_size=world_size)
    return [
        sum(
            parameter.elements
            for chunk in range(config.parallel.virtual_pipeline)
            for parameter in chunk_parameters(
                config, VOCABULARY, place_of(rank, config.parallel, layout).pipeline, chunk
            )
        )
        for rank in range(world_size)
    ]


def compare(processes: Processes, overrides: Sequence[str], *, bf16: bool) -> None:
    overrides = [*SHAPE, *overrides]
    real = processes.run(state_bytes, overrides, bf16=bf16)
    assert [state for state, _ in real] == predicted(overrides, processes.size, bf16=bf16)
    assert [count for _, count in real] == local_elements(overrides, processes.size)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Processes]:
    """A process of its own: this one's state of megatron-core is other tests'."""
    with Processes(1) as processes:
        yield processes


def test_one_rank_holds_what_is_predicted(one_rank: Processes) -> None:
    compare(one_rank, [], bf16=False)
    compare(one_rank, ["model.tie_embeddings=true", "model.qk_norm=false"], bf16=True)
    # Matrices keep one moment.
    muon = ["optim.name=muon", "parallel.distributed_optimizer=false", "model.mtp.depth=1"]
    compare(one_rank, [*muon, "model.attention_sink=learnable"], bf16=True)


@pytest.mark.parametrize("overrides", LAYOUTS_OF_2, ids=str)
def test_each_of_two_ranks_holds_what_is_predicted(
    two_processes: Processes, overrides: list[str]
) -> None:
    compare(two_processes, overrides, bf16=False)


def test_in_bf16_there_are_masters_sharded_likewise(two_processes: Processes) -> None:
    compare(two_processes, ["parallel.expert=2"], bf16=True)
    compare(two_processes, ["parallel.distributed_optimizer=false"], bf16=True)


@pytest.mark.parametrize("overrides", LAYOUTS_OF_4, ids=str)
def test_each_of_four_ranks_holds_what_is_predicted(
    four_processes: Processes, overrides: list[str]
) -> None:
    compare(four_processes, overrides, bf16=False)


def test_one_rank_alone_holds_all_parameters() -> None:
    config = compose(SHAPE)
    counted = count_parameters(config.model, config.mone, VOCABULARY, padded=True).total
    assert local_elements(SHAPE, 1) == [counted]


@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=30),
    ranks=st.integers(1, 12),
    bucket=st.sampled_from([None, 1, 300, 1500]),
    own=st.integers(0, 29),
)
def test_shards_add_up_to_the_parameters(
    sizes: list[int], ranks: int, bucket: int | None, own: int
) -> None:
    parameters = [LocalParameter(str(i), size, own_bucket=i == own) for i, size in enumerate(sizes)]
    buffer = lay_out(parameters, ranks, bucket_size=bucket, padded=True)
    assert buffer.padded % ranks == 0
    assert sum(buffer.shard(rank) for rank in range(ranks)) == sum(sizes)
    assert all(0 <= buffer.shard(rank) <= buffer.padded // ranks for rank in range(ranks))


def predicted_activations(overrides: Sequence[str], *, bf16: bool) -> int:
    config = compose(overrides)
    numerics = Numerics("cpu", 2 if bf16 else 4)
    saved = [
        activations.embedding(config, numerics),
        activations.output(config, numerics, VOCABULARY),
        activations.shared_by_layers(config, numerics),
    ]
    depth = prediction_kinds(config, 0)
    saved += depth.total() * [activations.prediction(config, numerics, VOCABULARY)]
    for moe, count in (layer_kinds(config, 0, 0) + depth).items():
        saved += count * [activations.kept_by_layer(config, numerics, moe=moe)]
    return sum(sum(sizes.values()) for sizes in saved)


EVERYWHERE = ["mone.apply_to=[routed,shared,dense]", "mone.balance.normalize=false"]
WIDE = [
    "model.hidden_size=96", "model.num_attention_heads=6", "model.num_query_groups=6",
    "model.expert_ffn_hidden_size=160", "model.num_experts=16", "train.seq_length=96",
    "model.router.pre_softmax=true", "model.qk_norm=false", "train.micro_batch_size=1",
]  # fmt: skip
MIXED = [
    "model.first_dense_layers=2", "model.shared_expert_ffn_hidden_size=192",
    "model.shared_expert_gate=true",
]  # fmt: skip
KEPT_WEIGHTS = ["train.seq_length=200", "train.micro_batch_size=1"]
ACTIVATIONS = [
    *(["experiment=tiny_mone", f"train.recompute={kind}"]
      for kind in ("none", "selective", "full")),
    ["experiment=tiny_mone", *WIDE],
    ["experiment=tiny_mone", *WIDE, "model.gate=low_rank"],
    ["experiment=tiny_mone", *MIXED],
    ["experiment=tiny_mone", *MIXED, *EVERYWHERE],
    ["experiment=tiny_mone", *WIDE, "mone.balance.weights=all", "train.recompute=selective"],
    ["experiment=tiny_moe", "model.num_experts=0", "train.recompute=selective"],
    ["experiment=tiny_moe", *MIXED, "model.activation=relu2", "model.qk_norm_scope=all_heads"],
    ["experiment=tiny_mone", *MIXED, *EVERYWHERE, "model.activation=relu2"],
    ["experiment=tiny_mone", *MIXED, *EVERYWHERE, "mone.memory=packed"],
    ["experiment=tiny_mone", "model.mtp.depth=2"],
    ["experiment=tiny_mone", "model.mtp.depth=1", "train.recompute=full"],
    ["experiment=tiny_mone", "model.attention_window=16", "model.full_attention_every=2"],
    ["experiment=tiny_mone", "model.attention_sink=learnable", "model.attention_window=24"],
    ["experiment=tiny_mone", "model.attention_sink=zero", "model.qk_norm=false",
     "train.recompute=selective"],
    ["experiment=tiny_moe", *LATENT, "model.attention_window=16"],
    ["experiment=tiny_moe", *LATENT],
    ["experiment=tiny_moe", *LATENT, "train.recompute=selective", "model.mla.v_head_dim=40"],
    ["experiment=tiny_moe", *LATENT, "model.mla.q_lora_rank=20", "model.mla.v_head_dim=24"],
    # Attention that keeps its weights.
    ["experiment=tiny_moe", *KEPT_WEIGHTS],
    ["experiment=tiny_moe", *KEPT_WEIGHTS, "train.recompute=selective"],
    ["experiment=tiny_moe", *KEPT_WEIGHTS, "model.attention_window=16",
     "model.full_attention_every=2"],
    ["experiment=tiny_moe", *KEPT_WEIGHTS, *LATENT, "model.mla.v_head_dim=24"],
]  # fmt: skip


# What adds least to those: in `make test-slow`.
MORE_ACTIVATIONS = [
    *(["experiment=tiny_moe", f"train.recompute={kind}"]
      for kind in ("none", "selective", "full")),
    ["experiment=tiny_mone", *WIDE, "model.gate=split"],
    ["experiment=tiny_moe", *WIDE],
    ["experiment=tiny_moe", *MIXED],
    ["experiment=tiny_mone", *MIXED, "mone.balance.coeff=0"],
    ["experiment=tiny_mone", *MIXED, "model.activation=sigmoid"],
]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        *ACTIVATIONS,
        *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_ACTIVATIONS),
    ],
    ids=str,
)
def test_activations_are_what_torch_saves(one_rank: Processes, overrides: list[str]) -> None:
    for bf16 in (False, True):
        (real,) = one_rank.run(saved_bytes, overrides, bf16=bf16)
        assert predicted_activations(overrides, bf16=bf16) == pytest.approx(real, rel=0.02), bf16


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.expert=2"],
        ["parallel.expert=2", "parallel.dispatcher=allgather"],
        ["parallel.tensor=2"],
        ["parallel.tensor=2", "parallel.expert=2", "model.qk_norm_scope=all_heads"],
        ["parallel.tensor=2", "parallel.expert_tensor=2"],
        ["parallel.tensor=2", *LATENT],
        ["parallel.tensor=2", *KEPT_WEIGHTS],
        ["parallel.context=2", "model.attention_sink=zero"],
        ["parallel.context=2"],
        ["parallel.tensor=2", "model.attention_sink=learnable"],
    ],
    ids=str,
)
def test_activations_in_layouts(two_processes: Processes, layout: list[str]) -> None:
    # Experts of one rank may get more rows than those of the other, and none are lost.
    overrides = ["experiment=tiny_mone", *MIXED, *layout]
    real = two_processes.run(saved_bytes, overrides, bf16=False)
    assert 2 * predicted_activations(overrides, bf16=False) == pytest.approx(sum(real), rel=0.1)


@pytest.mark.parametrize(
    ("stages", "chunks", "batch"), [(4, 1, 8), (4, 1, 2), (2, 2, 8), (2, 2, 2)], ids=str
)
def test_passes_in_flight(
    two_processes: Processes, four_processes: Processes, stages: int, chunks: int, batch: int
) -> None:
    overrides = [
        "experiment=tiny_moe", f"parallel.pipeline={stages}", f"train.global_batch_size={batch}",
        f"parallel.virtual_pipeline={chunks}", "train.micro_batch_size=1", "train.seq_length=16",
    ]  # fmt: skip
    config = compose(overrides)
    layout = validate(config, world_size=stages)
    processes = two_processes if stages == 2 else four_processes
    counted = [passes_in_flight(config.parallel, layout, stage).total() for stage in range(stages)]
    assert processes.run(most_passes_in_flight, overrides) == counted


# megatron-core's names of our groups.
GROUPS = {
    "tensor": "TENSOR_MODEL_PARALLEL_GROUP",
    "context": "CONTEXT_PARALLEL_GROUP",
    "data": "DATA_PARALLEL_GROUP_WITH_CP",
    "expert": "EXPERT_MODEL_PARALLEL_GROUP",
    "expert_data": "EXPERT_DATA_PARALLEL_GROUP",
    "expert_and_tensor": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "pipeline": "PIPELINE_MODEL_PARALLEL_GROUP",
}


def predicted_traffic(overrides: Sequence[str], world_size: int, rank: int) -> dict[str, float]:
    config = compose(overrides)
    layout = validate(config, world_size=world_size)
    stage = place_of(rank, config.parallel, layout).pipeline
    state = stage_state(config, layout, VOCABULARY, stage, weight_bytes=4)
    names = GROUPS
    if config.parallel.expert_tensor == 1:
        # Groups of the same ranks are one, and have the name of the one that was asked for first.
        names = GROUPS | {"expert_and_tensor": GROUPS["expert"]}
    return {
        f"{names[item.group.name]}: {item.operation.split()[-1]}": item.of_step(layout)
        for item in stage_traffic(config, layout, state, stage, Numerics("cpu", 4))
        if item.operation != "all-reduce"
    }


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["parallel.tensor=2"],
        ["parallel.expert=2"],
        ["parallel.expert=2", "parallel.dispatcher=allgather"],
        ["parallel.tensor=2", "parallel.expert=2", "train.recompute=full"],
        ["parallel.tensor=2", "parallel.expert=2", "train.recompute=selective"],
        ["parallel.tensor=2", *LATENT],
        ["parallel.tensor=2", *LATENT, "model.mla.q_lora_rank=12", "train.recompute=full"],
        ["parallel.pipeline=2"],
        ["parallel.context=2"],
        ["parallel.context=2", "train.recompute=selective"],
        ["parallel.tensor=2", "model.mtp.depth=2"],
        ["parallel.tensor=2", "model.mtp.depth=1", "train.recompute=full"],
        ["parallel.pipeline=2", "model.mtp.depth=1"],
    ],
    ids=str,
)
def test_a_real_step_sends_what_is_planned(two_processes: Processes, layout: list[str]) -> None:
    # Two microbatches, or one on each rank.
    overrides = ["experiment=tiny_mone", "train.global_batch_size=4", *MIXED, *layout]
    for rank, real in enumerate(two_processes.run(sent_in_a_step, overrides)):
        planned = predicted_traffic(overrides, 2, rank)
        assert real.keys() == planned.keys()
        for key, size in real.items():
            # How many rows go to the other rank is the router's choice; the routing map is bool.
            uneven = "EXPERT" in key and "DATA" not in key
            assert planned[key] == pytest.approx(size, rel=0.15 if uneven else 1e-9), key
