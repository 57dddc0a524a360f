"""What ties decide: against counts by hand, in training, and of a model's weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mone_megatron.kernels.reference import topk_mask
from mone_megatron.lab.benchmarks.ties import (
    TieCounter,
    TieOrder,
    TieWay,
    mask_with_order,
    tie_statistics,
)
from mone_megatron.testing.tools import Main, load_tool


@pytest.fixture(scope="module")
def main() -> Main:
    return load_tool("bench")


def rows(count: int, neurons: int, seed: int = 0) -> Tensor:
    """Scores of 6 different values, so that most rows tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, (count, neurons), generator=generator).bfloat16()


@pytest.mark.parametrize("order", ["lowest", "highest", "random"])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_every_order_keeps_the_largest_and_exactly_k(order: TieOrder, k: int) -> None:
    scores_TF = rows(50, 16)
    mask_TF = mask_with_order(scores_TF, k, order, torch.Generator().manual_seed(1))
    assert (mask_TF.sum(dim=-1) == k).all()
    kept = scores_TF.where(mask_TF, torch.inf).amin(dim=-1)
    left = scores_TF.where(~mask_TF, -torch.inf).amax(dim=-1)
    assert (kept >= left).all()
    if order == "lowest":
        assert torch.equal(mask_TF, topk_mask(scores_TF, k))


def test_orders_differ_in_ties_only() -> None:
    scores_TF = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    masks = {
        order: mask_with_order(scores_TF, 2, order).int().tolist()[0]
        for order in ("lowest", "highest")
    }
    assert masks == {"lowest": [1, 1, 0, 0, 0], "highest": [1, 0, 0, 1, 0]}
    distinct_TF = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    for order in ("highest", "random"):
        assert torch.equal(mask_with_order(distinct_TF, 7, order), topk_mask(distinct_TF, 7))
    with pytest.raises(ValueError, match="'middle' is unknown"):
        mask_with_order(scores_TF, 2, "middle")  # type: ignore[arg-type]


def test_counts_by_hand() -> None:
    counter = TieCounter("lowest", neurons=4, kept=2, experts=2, seed=0)
    counter.choose(torch.ones(3, 4))  # not counted
    counter.counting = True
    scores_TF = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    counter.choose(scores_TF, torch.tensor([0, 1]))
    found = tie_statistics([counter])
    assert (found.rows, found.neurons, found.kept) == (2, 4, 2)
    assert found.rows_decided_by_ties == 0.5
    assert (found.tied, found.dropped) == (2.0, 1.0)  # 3 and 1 of which 2 and 0 go
    # Loads 1 1 0 0 and 0 0 1 1 of mean 1 in all; with every tied neuron 1/3 in the first row.
    assert found.load_over_parts == (1.0, 1.0, 1.0, 1.0)
    assert found.bias_over_parts == pytest.approx((0.0, 2 / 3, -1 / 3, -1 / 3))
    assert found.dead_share == 0.5
    assert found.entropy == pytest.approx(0.5)
    assert found.correlation == pytest.approx(0.0)


def test_an_expert_without_tokens_has_no_load() -> None:
    counter = TieCounter("lowest", neurons=4, kept=2, experts=3, seed=0)
    counter.counting = True
    with pytest.raises(ValueError, match="no token"):
        tie_statistics([counter])
    counter.choose(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    counter.choose(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([2]))
    found = tie_statistics([counter])
    assert (found.dead_share, found.rows) == (0.5, 1)
    assert found.entropy == pytest.approx(math.log(2) / math.log(4))


def test_the_bias_of_the_orders_mirrors() -> None:
    scores_TF = rows(4000, 32)
    bias = {}
    for order in ("lowest", "highest", "random"):
        counter = TieCounter(order, neurons=32, kept=8, experts=1, seed=3)  # type: ignore[arg-type]
        counter.counting = True
        counter.choose(scores_TF)
        bias[order] = tie_statistics([counter]).first_over_last
    assert bias["lowest"] > 0.3
    assert bias["highest"] == pytest.approx(-bias["lowest"], rel=0.1)
    assert abs(bias["random"]) < 0.1 * bias["lowest"]


def test_training_with_every_order(main: Main, tmp_path: Path) -> None:
    output = tmp_path / "ties.json"
    arguments = ["ties", "--experiment", "tiny_mone", "--steps", "2", "--counted-steps", "1"]
    sizes = ["model.num_layers=1", "train.seq_length=64", "train.global_batch_size=2"]
    data = f"data.cache_dir={tmp_path / 'cache'}"
    assert main([*arguments, "--seeds", "1", "2", "--output", str(output), *sizes, data]) == 0
    both = json.loads(output.read_text())["result"]["trained"]
    trained = both[:4]
    assert [one["seed"] for one in both] == [1] * 4 + [2] * 4
    assert both[0]["loss"] != both[4]["loss"]
    assert [one["way"] for one in trained] == [
        "bf16, lowest", "bf16, highest", "bf16, random", "fp32, lowest",
    ]  # fmt: skip
    for one in trained:
        assert one["ties"]["rows"] == 2 * 64 * 2  # samples, tokens, experts of a token
        assert one["router"]["tokens"] == 2 * 64
        assert one["router"]["dtype"] == "float32"
        assert one["loss"] > 0
    lowest, highest, _, whole = (one["ties"] for one in trained)
    assert lowest["rows_decided_by_ties"] > 0.02
    assert lowest["bias_over_parts"][0] > 0 > highest["bias_over_parts"][0]
    assert whole["rows_decided_by_ties"] < 0.01
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("dense")
    words = {"<unk>": 0} | {chr(97 + index): index + 1 for index in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=27, hidden_size=32, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    return folder


def test_of_the_weights_of_a_model(main: Main, dense_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "ties.json"
    where = ["ties", "--model", str(dense_model), "--text", str(dense_model / "text.txt")]
    assert main([*where, "--seq-length", "32", "--max-tokens", "64", "--output", str(output)]) == 0
    result = json.loads(output.read_text())["result"]
    found = {one["way"]: one["ties"] for one in result["measured"]}
    assert list(found) == ["bf16, lowest", "bf16, highest", "bf16, random", "fp32, lowest"]
    assert all(ties["kept"] == 64 and ties["rows"] == 2 * 64 for ties in found.values())
    assert found["bf16, lowest"]["rows_decided_by_ties"] > 0.1
    assert found["fp32, lowest"]["rows_decided_by_ties"] < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "corpus.txt"], "--text: needs --model"),
        (["--model", "x", "--steps", "3"], "--steps: is of no use with --model"),
        (["--model", "x"], "--text: give a corpus"),
        (["--model", "x", "--text", "y", "a=b"], "a=b: is of no use with --model"),
        (["--counted-steps", "3", "--steps", "2"], "--counted-steps: 3 is more than --steps=2"),
        (
            ["--model", "nowhere", "--text", "y", "--score", "best"],
            "--score: 'best' is unknown; use one of abs_activation",
        ),
        (["--experiment", "tiny_moe"], "--experiment: tiny_moe selects no neurons"),
        (["--model", "nowhere", "--text", "y", "--keep-ratio", "1"], "--keep-ratio: 1 is not"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    main: Main, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ties", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert TieWay("bf16", "lowest") == TieWay.all_of(["lowest"], fp32=False)[0]
