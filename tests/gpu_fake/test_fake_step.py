"""The step of the real model on a CUDA device that is not there, in every layout.

What holds everywhere: no operation between devices (FakeTensors refuse it), nothing that NCCL or a
grouped product would refuse, and no wait for the GPU by our code in a layer; at most three a step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import SMALL, FakeRun, fake_run

from mone_megatron.testing.fake_cuda.guard import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no fake device: {why_not()}")

MONE = ("experiment=tiny_mone", *SMALL)
LATENT = (
    "model.attention=mla",
    "model.num_query_groups=4",
    "model.qk_norm=false",
    "model.mla.kv_lora_rank=32",
    "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_rope_head_dim=8",
    "model.mla.v_head_dim=16",
)
# Name: (processes, settings). The second half takes as long and finds less.
MAIN = {
    "one": (1, (*MONE, "train.global_batch_size=2")),
    "ep2": (4, (*MONE, "parallel.expert=2")),
    "tp2_ep2": (4, (*MONE, "parallel.tensor=2", "parallel.expert=2")),
    "pp2_interleaved": (2, (*MONE, "parallel.pipeline=2", "parallel.virtual_pipeline=2",
                            "model.num_layers=4")),
    "allgather": (4, (*MONE, "parallel.expert=2", "parallel.dispatcher=allgather",
                      "model.num_layers=1")),
}  # fmt: skip
REST = {
    "moe": (4, ("experiment=tiny_moe", *SMALL, "parallel.expert=2")),
    "etp2": (4, (*MONE, "parallel.tensor=2", "parallel.expert_tensor=2")),
    "etp2_allgather": (4, (*MONE, "parallel.tensor=2", "parallel.expert_tensor=2",
                           "parallel.dispatcher=allgather")),
    "etp2_one_expert": (8, (*MONE, "parallel.expert_tensor=2", "parallel.expert=4",
                            "model.num_experts=4")),
    "ep8_one_expert": (8, (*MONE, "parallel.expert=8")),
    "pp2": (2, (*MONE, "parallel.pipeline=2")),
    "recompute_selective": (4, (*MONE, "parallel.expert=2", "train.recompute=selective")),
    "recompute_full": (4, (*MONE, "parallel.expert=2", "train.recompute=full")),
    "packed": (4, (*MONE, "parallel.expert=2", "mone.memory=packed")),
    "shared": (4, (*MONE, "parallel.tensor=2", "model.shared_expert_ffn_hidden_size=64",
                   "mone.apply_to=[routed,shared]")),
    "shared_beside_routed": (4, (*MONE, "parallel.tensor=2", "parallel.expert=2",
                                 "model.shared_expert_ffn_hidden_size=64",
                                 "model.first_dense_layers=1")),
    "latent": (4, (*MONE, *LATENT, "parallel.tensor=2")),
    "without_distributed_optimizer": (2, (*MONE, "parallel.distributed_optimizer=false")),
    "odd_keep": (2, (*MONE, "mone.memory=packed", "mone.keep_ratio=0.3", "parallel.expert=2")),
    "low_rank_gate": (2, (*MONE, "model.gate=low_rank", "model.gate_rank=16",
                          "parallel.expert=2")),
    "given_mask": (2, (*MONE, "mone.rule=mass", "model.router.dtype=fp64")),
    "batch_topk": (2, (*MONE, "mone.rule=batch_topk", "parallel.expert=2")),
    "pooled": (2, (*MONE, "mone.rule=pooled")),
    "annealed": (2, (*MONE, "mone.keep_ratio_schedule=linear", "mone.keep_ratio_steps=1",
                     "mone.balance.coeff=0")),
    "signed_gate": (2, (*MONE, "mone.score=signed_gate")),
    "qwen3_30b_a3b": (8, ("experiment=qwen3_30b_a3b_mone", "parallel=expert_8",
                          "model.num_layers=2", "train.global_batch_size=8",
                          "train.micro_batch_size=1", "train.recompute=selective")),
}  # fmt: skip


# Whose lines attention, its norms and RoPE are, without Transformer Engine.
IN_GRAPHS = (
    "mone_megatron/model/",
    "megatron/core/transformer/attention.py",
    "megatron/core/transformer/multi_latent_attention.py",
    "megatron/core/models/common/embeddings/",
    "megatron/core/fusions/",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake_cuda")


@pytest.fixture(
    params=[
        *(pytest.param(setting, id=name) for name, setting in MAIN.items()),
        *(pytest.param(setting, id=name, marks=pytest.mark.slow) for name, setting in REST.items()),
    ]
)
def run(request: pytest.FixtureRequest, folder: Path) -> FakeRun:
    world, overrides = request.param
    return fake_run(folder, world, *overrides)


def test_a_step_is_one_that_a_gpu_would_take(run: FakeRun) -> None:
    assert run.found(kind="fault") == []
    waits = run.found("step", kind="wait")
    ours = [wait for wait in waits if wait.in_layer and wait.by_us]
    assert ours == []
    # The loss and what rides along, the gradient norm, and the end of the step.
    pipeline = [wait for wait in waits if wait.place.startswith("megatron/core/pipeline_parallel/")]
    outside = [wait for wait in waits if not wait.in_layer and wait not in pipeline]
    assert len(outside) <= 3, outside
    # megatron-core's: twice for its permutation and once for the counts, forward only.
    # So is one after each exchange between stages of a pipeline that is not interleaved.
    assert len(pipeline) <= 2 * run.written["microbatches"]
    forwards = 2 if any("recompute" in key for key in run.written["overrides"]) else 1
    assert len(waits) - len(outside) - len(pipeline) <= 3 * run.dispatches * forwards
    # What a CUDA graph of attention would refuse (parallel/cuda_graphs.py).
    held = [found for kind in ("wait", "copy") for found in run.found("step", kind=kind)
            if found.place.startswith(IN_GRAPHS)]  # fmt: skip
    assert held == []
    assert run.launches("forward_kernel") > 0
    # In training, evaluation, steps that count and after a resume: all was compiled before.
    assert run.written["compiled_later"] == []
    # Forward and back, and where neurons are chosen or counted more.
    alone = "experiment=tiny_moe" in run.written["overrides"]
    assert run.written["compiled_before"] > (1 if alone else 2)
    said = f"compiled {run.written['compiled_before']} variants of kernels before the first step"
    assert run.said.count(said) == 1
    # One kernel for all of a parameter's update, without temporaries.
    assert [part["fused"] for part in run.written["optimizers"]] in ([True], [True, True])
