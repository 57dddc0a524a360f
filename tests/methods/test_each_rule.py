"""What each rule keeps, against a reference of its own: brute force, or another library's code."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector

ROWS, NEURONS = 24, 64


def scores(seed: int = 0, *, ties: bool = False) -> Tensor:
    drawn = torch.randn(ROWS, NEURONS, generator=torch.Generator().manual_seed(seed))
    return (drawn * 3).round() if ties else drawn


def mask(
    rule: str,
    scores_TF: Tensor,
    keep_ratio: float = 0.25,
    score: str = "signed_gate",
    **options: Any,
) -> Tensor:
    selection = NeuronSelection(keep_ratio, score, rule, options)
    module = NeuronSelector(selection, scores_TF.shape[-1])
    kept: Tensor = module(scores_TF, torch.ones_like(scores_TF))
    return kept


def by_hand(row: list[float], count: int) -> list[bool]:
    """True at the largest ``count`` of a row, the first of equal ones."""
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    return [index in order[:count] for index in range(len(row))]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (8, 16), (16, 64)])
def test_n_of_m_keeps_the_best_of_each_group(n: int, m: int, ties: bool) -> None:
    drawn = scores(ties=ties)
    kept = mask("n_of_m", drawn, n / m, m=m)
    groups = zip(drawn.view(-1, m).tolist(), kept.view(-1, m).tolist(), strict=True)
    assert all(found == by_hand(group, n) for group, found in groups)
    if m == NEURONS:
        assert torch.equal(kept, mask("topk", drawn, n / m))


def test_torch_takes_two_of_four_as_structured_sparsity() -> None:
    drawn = scores().half()
    sparse = torch.where(mask("n_of_m", drawn, 0.5), drawn, 0)
    drawn_32 = sparse.repeat(2, 1)[:32]
    values, meta = sparse_semi_structured_from_dense_cutlass(drawn_32)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), drawn_32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 8, 16])
def test_blocks_keep_whole_blocks_of_largest_sum(size: int, ties: bool) -> None:
    drawn = scores(ties=ties)
    kept = mask("blocks", drawn, 0.25, size=size)
    for row, found in zip(drawn.view(ROWS, -1, size), kept.view(ROWS, -1, size), strict=True):
        best = by_hand(row.sum(dim=-1).tolist(), NEURONS // size // 4)
        assert found.tolist() == [[chosen] * size for chosen in best]


@pytest.mark.parametrize("keep_ratio", [0.05, 0.25, 0.5, 0.75])
def test_statistical_keeps_what_gemma_3n_keeps(keep_ratio: float) -> None:
    gate = scores() * 2 + 0.3
    theirs = Gemma3nTextMLP._gaussian_topk(
        SimpleNamespace(activation_sparsity=1 - keep_ratio),
        gate,  # type: ignore[arg-type]
    )
    kept = mask("statistical", gate, keep_ratio)
    assert torch.equal(kept, theirs > 0)
    assert kept.float().mean().item() == pytest.approx(keep_ratio, abs=0.02)


def problems(*overrides: str) -> Iterator[str]:
    config = compose(["experiment=tiny_mone", "device=cpu", *overrides])
    try:
        validate(config, world_size=4)
    except ConfigError as error:
        yield from error.problems


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rule=n_of_m", "rule_options.m=6"], "mone.rule_options.m: 6 does not divide 64 neurons"),
        (["rule=n_of_m", "keep_ratio=0.3"], "mone.keep_ratio: 0.3 of mone.rule_options.m=4"),
        (["rule=blocks", "rule_options.size=48"], "mone.rule_options.size: 48 does not divide 64"),
        (["rule=blocks", "keep_ratio=0.3"], "mone.keep_ratio: 0.3 of 4 blocks"),
        (["rule=n_of_m", "rule_options.n=1"], "mone.rule_options.n: unknown key"),
        (
            ["rule=n_of_m", "keep_ratio_schedule=linear", "keep_ratio_steps=5"],
            "mone.keep_ratio_schedule: linear comes to ratios that mone.rule=n_of_m refuses, at "
            "step 2 the first",
        ),
    ],
)
def test_a_budget_that_a_rule_cannot_keep_is_refused(overrides: list[str], message: str) -> None:
    found = list(problems(*(f"mone.{override}" for override in overrides)))
    assert len(found) == 1, found
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    ("rule", "options"), [("n_of_m", "rule_options.m=32"), ("blocks", "rule_options.size=64")]
)
def test_neurons_that_are_chosen_together_are_on_one_rank(rule: str, options: str) -> None:
    found = list(
        problems(
            f"mone.rule={rule}",
            f"mone.{options}",
            "mone.keep_ratio=1",
            "parallel.tensor=4",
            "parallel.expert_tensor=4",
        )
    )
    assert any("adjacent neurons together, which do not divide 64 neurons" in one for one in found)
