from __future__ import annotations

import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels.reference import topk_mask
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector, sharded_topk_mask
from mone_megatron.testing.processes import Processes


@pytest.mark.parametrize(
    ("keep_ratio", "neurons", "kept"),
    [(0.25, 64, 16), (0.125, 12, 2), (0.5, 20, 10), (1.0, 7, 7), (1 / 3, 100, 33), (0.01, 128, 1)],
)
def test_kept_neurons(keep_ratio: float, neurons: int, kept: int) -> None:
    assert NeuronSelection(keep_ratio).budget(neurons).kept == kept


@pytest.mark.parametrize("keep_ratio", [0.0, -0.25, 1.01, math.nan])
def test_keep_ratio_outside_its_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"mone.keep_ratio: {keep_ratio} is not in")):
        NeuronSelection(keep_ratio).budget(64)


def test_keeping_no_neuron_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"mone.keep_ratio: 0.01 of 8 .* use at least 0.125"):
        NeuronSelection(0.01).budget(8)
    # The fix that the message gives works.
    assert NeuronSelection(0.125).budget(8).kept == 1


def test_neuron_topk_is_a_hook_point_without_gradients() -> None:
    selects = NeuronSelector(NeuronSelection(0.25, "abs_gate"), 8)
    seen: list[Tensor] = []
    selects.register_forward_hook(lambda module, inputs, mask: seen.append(mask))
    gate = torch.arange(8.0).sub(5).unsqueeze(0).requires_grad_()
    mask = selects(gate, gate)
    assert mask.tolist() == [[True, True, False, False, False, False, False, False]]
    assert seen[0] is mask
    assert repr(selects) == "NeuronSelector(topk: keep 2 of 8 by abs_gate)"


def _rows(neurons: int) -> Tensor:
    """Rows of every kind that could go wrong when their neurons lie on several ranks."""
    generator = torch.Generator().manual_seed(neurons)
    random = torch.randn(40, neurons, generator=generator)
    rising = torch.arange(float(neurons)).unsqueeze(0)
    nan = random[:2].clone()
    nan[0, 1] = torch.nan
    nan[1, neurons // 2 :] = torch.nan
    infinite = random[:2].clone()
    infinite[0, ::3] = torch.inf
    infinite[1, ::2] = -torch.inf
    return torch.cat(
        [
            random,
            (random * 2).round() / 2,  # many ties, across ranks, too
            random.bfloat16().float(),
            torch.zeros(1, neurons),
            rising,  # all of the last rank's come first
            -rising,
            (rising >= neurons // 2).float(),  # ties within each half
            torch.tensor([0.0, -0.0]).repeat(neurons)[:neurons].unsqueeze(0),
            nan,
            infinite,
        ]
    )


def _sharded_masks(cases: list[tuple[int, int, torch.dtype]]) -> list[Tensor]:
    masks = []
    for neurons, k, dtype in cases:
        shard = _rows(neurons).to(dtype).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
        masks.append(sharded_topk_mask(shard, k, dist.group.WORLD))
    masks.append(sharded_topk_mask(torch.zeros(0, 4), 3, dist.group.WORLD))
    return masks


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_mask_equals_one_ranks_mask(ranks: int, request: pytest.FixtureRequest) -> None:
    processes: Processes = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[ranks])
    cases = [
        # K below, at and above the neurons of one rank, and all of them.
        *(
            (16, k, dtype)
            for k in (1, 4, 8, 9, 15, 16)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        (64, 16, torch.bfloat16),
        (12, 5, torch.float32),
    ]
    by_rank = processes.run(_sharded_masks, cases)
    for case, (neurons, k, dtype) in enumerate(cases):
        rows = _rows(neurons).to(dtype)
        whole = torch.cat([masks[case] for masks in by_rank], dim=-1)
        assert torch.equal(whole, topk_mask(rows, k)), (neurons, k, dtype)
        assert whole[~rows.isnan().any(-1)].sum(-1).eq(k).all()
    assert all(masks[-1].shape == (0, 4) for masks in by_rank)


def _masks_of_module(gate: Tensor, up: Tensor, score: str) -> tuple[Tensor, bool]:
    rank, size = dist.get_rank(), dist.get_world_size()
    selects = NeuronSelector(NeuronSelection(0.25, score), gate.shape[-1], dist.group.WORLD)
    shards = (tensor.chunk(size, dim=-1)[rank].clone().requires_grad_() for tensor in (gate, up))
    mask = selects(*shards)
    return mask, mask.requires_grad


@pytest.mark.parametrize("score", ["abs_activation", "abs_gate", "signed_gate", "abs_product"])
def test_module_selects_over_its_group(two_processes: Processes, score: str) -> None:
    gate, up = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = NeuronSelector(NeuronSelection(0.25, score), 20)(gate, up)
    by_rank = two_processes.run(_masks_of_module, gate, up, score)
    assert torch.equal(torch.cat([mask for mask, _ in by_rank], dim=-1), expected)
    assert not any(needs_grad for _, needs_grad in by_rank)
