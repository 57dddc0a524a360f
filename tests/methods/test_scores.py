"""Every registered score, by being registered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mone_megatron.kernels import ops, reference
from mone_megatron.kernels.reference import TopK
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.score import Neurons, Score
from mone_megatron.methods.scores import SCORES

ROWS, NEURONS = 6, 24
SILU = ACTIVATIONS["silu"].function


def parts(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, ROWS, NEURONS, generator=generator).to(dtype)
    norm = torch.rand(ROWS, NEURONS, generator=generator) + 0.5
    return {"gate_TF": gate, "up_TF": up, "down_norm_TF": norm}


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_reads_what_it_declares(score: Score, dtype: torch.dtype) -> None:
    scores = score.of(activate=SILU, **parts(dtype))
    assert scores.shape == (ROWS, NEURONS)
    assert scores.isfinite().all()
    # Without a sign none is negative; with one some are.
    assert bool((scores < 0).any()) == score.signed
    # Each declared part matters, and is given by no other name.
    for part in score.reads - {"activation", "product"}:
        changed = parts(dtype)
        changed[f"{part}_TF"] = changed[f"{part}_TF"].flip(-1)
        assert not torch.equal(score.of(activate=SILU, **changed), scores)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
def test_a_neuron_is_ranked_by_itself(score: Score) -> None:
    inputs = parts()
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))
    permuted = score.of(activate=SILU, **{name: part[:, order] for name, part in inputs.items()})
    assert torch.equal(permuted, score.of(activate=SILU, **inputs)[:, order])


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
@pytest.mark.parametrize("activation", ACTIVATIONS.names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_paths_rank_as_the_reference(
    score: Score, activation: str, dtype: torch.dtype
) -> None:
    if "down_norm" in score.reads:
        pytest.skip("never given to a kernel: its mask is")
    gate, up, _ = parts(dtype).values()
    activate = ACTIVATIONS[activation].function
    keep = TopK(7, score.name)
    expected = reference.kept_mask(gate, up, keep, activate)
    hidden = ops.selected_glu(gate, up, keep, None, activate)
    assert torch.equal(hidden, reference.selected_glu(gate, up, expected, None, activate))


def test_an_undeclared_part_is_an_error() -> None:
    def greedy(neurons: Neurons) -> Tensor:
        return neurons.up

    score = Score("greedy", "u", "a test", greedy, frozenset({"gate"}))
    with pytest.raises(AssertionError, match="reads `up` without declaring it"):
        score.of(activate=SILU, **parts())


def test_a_kernel_is_not_asked_for_what_it_has_not() -> None:
    with pytest.raises(AssertionError, match="no kernel has what the score wina reads"):
        TopK(3, "wina")
