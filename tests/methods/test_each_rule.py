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


def flattened(scores_TF: Tensor, keep_ratio: float) -> Tensor:
    """True at the largest of a whole block, by torch's ranking of it as one row."""
    flat = scores_TF.flatten()
    best = flat.sort(descending=True, stable=True).indices[: round(keep_ratio * flat.numel())]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, True).view_as(scores_TF)


def trained(rule: str, experts: int = 3, score: str = "abs_gate", **options: Any) -> NeuronSelector:
    selection = NeuronSelection(0.25, score, rule, options)
    module = NeuronSelector(selection, NEURONS, num_local_experts=experts, num_experts=experts)
    return module.train()


@pytest.mark.parametrize("ties", [False, True])
def test_batch_topk_ranks_the_rows_of_an_expert_and_a_microbatch_together(ties: bool) -> None:
    drawn = scores(ties=ties)
    blocks = torch.arange(ROWS) % 5
    module = trained("batch_topk", experts=2, score="signed_gate")
    kept = module(drawn, drawn, blocks % 2, block_T=blocks)
    for block in range(5):
        assert torch.equal(kept[blocks == block], flattened(drawn[blocks == block], 0.25))
    alone = torch.cat([module(row, row) for row in drawn.split(1)])
    assert torch.equal(alone, mask("topk", drawn))


def test_batch_topk_is_a_threshold_outside_training() -> None:
    module = trained("batch_topk", experts=2, decay=0.5)
    expert = torch.arange(ROWS) % 2
    expected = torch.zeros(2)
    for step in range(4):
        drawn = scores(step)
        kept = module(drawn, drawn, expert, observing=True)
        module.advance(applied=True)
        smallest = torch.stack(
            [drawn.abs()[expert == e][kept[expert == e]].min() for e in range(2)]
        )
        # The running mean as Adam corrects its own: by the sum of its weights.
        expected = 0.5 * expected + 0.5 * smallest
        tau = expected / (1 - 0.5 ** (step + 1))
        torch.testing.assert_close(module.state["tau"], tau)
    drawn = scores(9)
    kept = module.eval()(drawn, drawn, expert)
    assert torch.equal(kept, drawn.abs() > tau[expert].unsqueeze(-1))
    assert torch.equal(kept[:1], module(drawn[:1], drawn[:1], expert[:1]))


def test_a_threshold_finds_the_density_of_experts_that_differ() -> None:
    module = trained("threshold")
    expert = torch.arange(ROWS) % 3
    size = torch.tensor([0.1, 1.0, 30.0])[expert].unsqueeze(-1)
    for step in range(80):
        drawn = scores(step) * size
        kept = module(drawn, drawn, expert, observing=True)
        if step == 0:
            assert torch.equal(kept, mask("topk", drawn, score="abs_gate"))
        module.advance(applied=True)
    module.eval()
    densities = []
    for step in range(100, 120):
        drawn = scores(step) * size
        kept = module(drawn, drawn, expert)
        assert torch.equal(kept, drawn.abs() > module.state["tau"][expert].unsqueeze(-1))
        densities.append([kept[expert == number].float().mean() for number in range(3)])
    assert torch.tensor(densities).mean(dim=0).tolist() == pytest.approx([0.25] * 3, rel=0.15)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.8, 0.99])
def test_mass_keeps_the_fewest_neurons_that_hold_its_share(p: float) -> None:
    drawn = scores()
    kept = mask("mass", drawn, score="abs_gate", p=p)
    share = drawn.abs() / drawn.abs().sum(dim=-1, keepdim=True)
    held = (share * kept).sum(dim=-1)
    smallest = share.masked_fill(~kept, torch.inf).amin(dim=-1)
    assert (held >= p - 1e-6).all()
    assert (held - smallest < p).all()
    assert (share.masked_fill(kept, 0).amax(dim=-1) <= smallest).all()


def test_the_whole_mass_is_every_neuron() -> None:
    assert mask("mass", scores(), score="abs_gate", p=1.0).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mone.rule=mass", "mone.rule_options.p=2"], "mone.rule_options.p: 2 is not in [0, 1]"),
        (["mone.rule=mass", "parallel.expert_tensor=2"], "parallel.expert_tensor: 2 spreads the"),
        (
            ["mone.rule=threshold", "mone.rule_options.rate=0"],
            "mone.rule_options.rate: 0 is not above 0",
        ),
        (
            ["mone.rule=batch_topk", "mone.rule_options.decay=1"],
            "mone.rule_options.decay: 1 is not in [0, 1)",
        ),
        (
            ["mone.rule=batch_topk", "parallel.tensor=2"],
            "mone.rule: batch_topk ranks the neurons of all tokens that an expert gets",
        ),
        (
            ["mone.rule=threshold", "mone.memory=packed"],
            "mone.memory: packed saves nothing with mone.rule=threshold",
        ),
    ],
)
def test_what_a_rule_cannot_do_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(problems(*overrides))
    assert len(found) == 1, found
    assert found[0].startswith(message)
