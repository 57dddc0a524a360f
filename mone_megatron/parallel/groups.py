"""Makes megatron-core's process groups for a layout, and the one kind that it does not make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.parallel.megatron_compat.auxiliary_losses import forget_layer_losses
from mone_megatron.parallel.megatron_compat.prediction_losses import forget_prediction_losses
from mone_megatron.parallel.megatron_compat.process_groups import sharing_groups


@dataclass(frozen=True)
class ExpertSources:
    """Holds what :class:`mone_megatron.mone.layer.MicrobatchSources` is made from; see there."""

    microbatch_of_source: tuple[int, ...]
    shared_group: dist.ProcessGroup | None


def connects_when_made() -> bool:
    """Returns whether a group's connections are made with it, and not when it is first used."""
    return dist.distributed_c10d._get_default_group().bound_device_id is not None


def open_groups(
    parallel: ParallelConfig, train: TrainConfig, *, timeout_seconds: int, in_graphs: bool = False
) -> None:
    """Makes megatron-core's groups and seeds its RNG trackers. Collective over all processes.

    Args:
        parallel: the layout.
        train: the seed.
        timeout_seconds: after which an operation over processes has failed.
        in_graphs: whether attention runs as CUDA graphs. Transformer Engine's then wants random
            states that a graph can hold, also where it draws nothing.
    """
    from megatron.core import parallel_state, tensor_parallel

    _forget_the_last_run()
    with sharing_groups(connected=connects_when_made()):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
            create_gloo_process_groups=False,
        )
    # Draws dropout only: initial weights do not depend on these streams.
    tensor_parallel.model_parallel_cuda_manual_seed(
        train.seed, te_rng_tracker=in_graphs, force_reset_rng=True
    )


def open_expert_sources(parallel: ParallelConfig) -> ExpertSources:
    """Returns which microbatches meet in the experts of this rank. Collective over all processes.

    megatron-core numbers ranks with tensor parallelism innermost, then context, data and pipeline
    parallelism; experts split the ranks of a pipeline stage into expert-tensor parallelism, then
    expert parallelism, then replicas. So the ranks of a pipeline stage form runs of
    ``tensor * context`` that share a microbatch, and runs of ``expert_tensor * expert`` whose
    tokens meet; one run length divides the other (checked by ``config.validate``).
    """
    from megatron.core import parallel_state

    per_microbatch = parallel.tensor * parallel.context
    per_experts = parallel.expert_tensor * parallel.expert
    if per_experts >= per_microbatch:
        sources = tuple(rank // per_microbatch for rank in range(per_experts))
        return ExpertSources(sources, None)
    # A microbatch is spread over several copies of each expert: they must add up their counts.
    if per_experts == 1:
        # Each of its ranks has all experts.
        return ExpertSources((0,), parallel_state.get_tensor_and_context_parallel_group())
    mine = None
    world = dist.get_world_size()
    for first in range(0, world, per_microbatch):
        for offset in range(per_experts):
            ranks = list(range(first + offset, first + per_microbatch, per_experts))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = group
    replicas = dist.get_process_group_ranks(parallel_state.get_expert_data_parallel_group())
    assert mine is not None
    assert set(dist.get_process_group_ranks(mine)) <= set(replicas)
    return ExpertSources((0,) * per_experts, mine)


def close_groups() -> None:
    """Leaves all groups; it may be called when they were never made."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        _forget_the_last_run()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _forget_the_last_run() -> None:
    """Drops process-wide globals of megatron-core, of another model's shape and batch."""
    from megatron.core.transformer.moe import moe_utils

    forget_layer_losses()
    forget_prediction_losses()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
