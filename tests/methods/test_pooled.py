"""One ranking over all experts of a token, against a ranking by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_each_rule import problems
from torch import Tensor

from mone_megatron.mone.selection import NeuronSelection, NeuronSelector
from mone_megatron.testing.launch import run_layouts

TOKENS, EXPERTS, NEURONS = 40, 6, 16
KEPT = 4


def rows(
    chosen: int, *, ties: bool = False, shuffled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, expert, token and weight of each row; rows by expert, or in any order."""
    generator = torch.Generator().manual_seed(3)
    experts = [torch.randperm(EXPERTS, generator=generator)[:chosen] for _ in range(TOKENS)]
    map_NA = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    for token, mine in enumerate(experts):
        map_NA[token, mine] = True
    expert, token = map_NA.T.nonzero().unbind(dim=-1)
    scores = torch.randn(len(token), NEURONS, generator=generator).abs()
    weight = torch.rand(len(token), generator=generator)
    if ties:
        scores, weight = (scores * 2).round(), (weight * 2).round()
    if shuffled:
        order = torch.randperm(len(token), generator=generator)
        return scores[order], expert[order], token[order], weight[order]
    return scores, expert, token, weight


def mask(rule: str, scores: Tensor, *row: Tensor, keep_ratio: float = KEPT / NEURONS) -> Tensor:
    expert, token, weight = row
    module = NeuronSelector(NeuronSelection(keep_ratio, "signed_gate", rule), NEURONS)
    kept: Tensor = module(scores, scores, expert, token_T=token, weight_T=weight)
    return kept


def by_hand(scores: Tensor, expert: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    """True at the best of each token, ties to the first expert and then the first neuron."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for number in set(token.tolist()):
        mine = (token == number).nonzero().flatten().tolist()
        places = [
            (-float(weight[row].double() * scores[row, neuron].double()), int(expert[row]), neuron,
             row)
            for row in mine
            for neuron in range(NEURONS)
        ]  # fmt: skip
        for _, _, neuron, row in sorted(places)[: KEPT * len(mine)]:
            kept[row, neuron] = True
    return kept


@pytest.mark.parametrize("chosen", [1, 2, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_it_is_one_ranking_of_a_token(chosen: int, ties: bool, shuffled: bool) -> None:
    drawn = rows(chosen, ties=ties, shuffled=shuffled)
    assert torch.equal(mask("pooled", *drawn), by_hand(*drawn))


def test_tokens_may_have_different_numbers_of_experts() -> None:
    drawn = rows(4)
    some = torch.rand(len(drawn[0]), generator=torch.Generator().manual_seed(1)) < 0.6
    scores, expert, token, weight = (tensor[some] for tensor in drawn)
    kept = mask("pooled", scores, expert, token, weight)
    assert torch.equal(kept, by_hand(scores, expert, token, weight))
    count = torch.zeros(TOKENS, dtype=torch.int64).index_add(0, token, kept.sum(dim=-1))
    assert torch.equal(count, KEPT * token.bincount(minlength=TOKENS))


@pytest.mark.parametrize("ties", [False, True])
def test_one_expert_a_token_is_the_largest_k(ties: bool) -> None:
    """Also where weights are so small that products would tie in fp32."""
    scores, expert, token, weight = rows(1, ties=ties)
    weight = weight * 1e-38 + 1e-40
    expected = mask("topk", scores, expert, token, weight)
    assert torch.equal(mask("pooled", scores, expert, token, weight), expected)


def test_keeping_all_keeps_all_and_nothing_of_a_token_with_a_nan() -> None:
    scores, expert, token, weight = rows(3)
    assert mask("pooled", scores, expert, token, weight, keep_ratio=1.0).all()
    scores[7, 2] = torch.nan
    kept = mask("pooled", scores, expert, token, weight)
    broken = token == token[7]
    assert broken.sum() == 3
    assert not kept[broken].any()
    assert torch.equal(kept[~broken], by_hand(scores, expert, token, weight)[~broken])


def test_no_rows_keep_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert mask("pooled", torch.zeros(0, NEURONS), empty, empty, torch.zeros(0)).shape == (
        0,
        NEURONS,
    )


RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=2",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "logging.layer_interval=1",
)  # fmt: skip


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_it_trains_with_tensor_parallelism_and_both_dispatchers(tmp_path: Path) -> None:
    pooled = (*RUN, "mone.rule=pooled")
    gathered = (*pooled, "parallel.dispatcher=allgather")
    one = {
        "pooled": pooled,
        "gathered": gathered,
        # One expert a token: a router's weight that is no 1 needs the softmax before the choice.
        **{
            f"one-{rule}": (*RUN, f"mone.rule={rule}", "model.experts_per_token=1",
                            "model.router.pre_softmax=true")
            for rule in ("pooled", "topk")
        },
    }  # fmt: skip
    run_layouts(one, processes=1, folder=tmp_path)
    run_layouts({"two": (*pooled, "parallel.tensor=2")}, processes=2, folder=tmp_path)
    expected = records(tmp_path / "pooled")
    for name in ("gathered", "two"):
        for record, one_process in zip(records(tmp_path / name), expected, strict=True):
            assert record["loss"] == pytest.approx(one_process["loss"], rel=1e-5)
            assert record["mone/density"] == pytest.approx(0.25, abs=1e-6)
    for record, topk in zip(
        records(tmp_path / "one-pooled"), records(tmp_path / "one-topk"), strict=True
    ):
        assert record["loss"] == topk["loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.expert=2"], "parallel.expert: 2 spreads the experts of a token over ranks"),
        (
            ["parallel.tensor=2", "parallel.expert_tensor=2"],
            "parallel.expert_tensor: 2 spreads the neurons of the routed MLPs over ranks, and",
        ),
        (["mone.memory=packed"], "mone.memory: packed saves nothing with mone.rule=pooled"),
    ],
)
def test_what_it_cannot_do_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(problems("mone.rule=pooled", *overrides))
    assert len(found) == 1, found
    assert found[0].startswith(message)
