"""The neurons each row keeps are the same in every layout, row by row.

Rows have no names across layouts, so the masks of one expert are compared as sorted lists.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mone_megatron.config.load import compose
from mone_megatron.kernels.ops import RowGroups
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches

Masks = dict[tuple[int, int], list[bytes]]


def kept_masks(overrides: tuple[str, ...]) -> Masks:
    """(layer, expert) -> sorted packed masks of one training step, gathered from all ranks."""
    trainer = build_trainer(
        ("experiment=tiny_mone", "device=cpu", *overrides), data_fingerprint="none"
    )
    found: Masks = defaultdict(list)

    def watch(experts: GroupedExperts) -> None:
        group, gate = experts.tensor_group, experts.neuron_gate
        rows_per_expert: list[int] = []

        def before(module: object, args: tuple[object, ...]) -> None:
            groups = args[1]
            assert isinstance(groups, RowGroups)
            rows_per_expert[:] = groups.counts_E.tolist()

        def after(module: object, args: object, mask_TF: torch.Tensor) -> None:
            parts = [torch.empty_like(mask_TF) for _ in range(group.size())]
            dist.all_gather(parts, mask_TF, group=group)
            if group.rank() == 0:
                whole = torch.cat(parts, dim=-1).numpy()
                assert (whole.sum(axis=-1) == 16).all()
                for local, rows in enumerate(np.split(whole, np.cumsum(rows_per_expert)[:-1])):
                    expert = gate.usage.first_expert + local
                    assert gate.layer_number is not None
                    packed = [row.tobytes() for row in np.packbits(rows, axis=-1)]
                    found[gate.layer_number, expert] += packed

        assert gate.selector is not None
        experts.register_forward_pre_hook(before)
        gate.selector.register_forward_hook(after)

    for chunk in trainer.chunks:
        for module in chunk.modules():
            if isinstance(module, GroupedExperts):
                watch(module)
    trainer.stepper.train(random_batches(trainer))
    everything: list[Masks] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everything, dict(found))
    merged: Masks = defaultdict(list)
    for part in everything:
        for key, rows in part.items():
            merged[key] += rows
    return {key: sorted(rows) for key, rows in merged.items()}


@pytest.fixture(scope="module")
def reference() -> Masks:
    with Processes(1) as processes:
        masks: Masks = processes.run(kept_masks, ())[0]
    config = compose(["experiment=tiny_mone"])
    tokens = config.train.global_batch_size * config.train.seq_length
    rows = tokens * config.model.experts_per_token * config.model.num_layers
    assert sum(map(len, masks.values())) == rows
    return masks


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.expert=2",),
        ("parallel.expert=2", "parallel.dispatcher=allgather"),
        ("parallel.tensor=2", "parallel.expert_tensor=2"),
        ("parallel.tensor=2",),
        ("parallel.tensor=2", "parallel.expert=2"),
        ("parallel.pipeline=2",),
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        (),
    ],
    ids=lambda overrides: "+".join(overrides) or "data",
)
def test_masks_equal_those_of_one_process_on_two(
    reference: Masks, two_processes: Processes, overrides: tuple[str, ...]
) -> None:
    assert two_processes.run(kept_masks, overrides)[0] == reference


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.tensor=2", "parallel.expert=2"),
        ("parallel.pipeline=2", "parallel.expert=2"),
        ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2"),
    ],
    ids="+".join,
)
def test_masks_equal_those_of_one_process_on_four(
    reference: Masks, four_processes: Processes, overrides: tuple[str, ...]
) -> None:
    assert four_processes.run(kept_masks, overrides)[0] == reference


def test_the_comparison_sees_a_different_mask(reference: Masks, two_processes: Processes) -> None:
    assert two_processes.run(kept_masks, ("mone.score=signed_gate",))[0] != reference
