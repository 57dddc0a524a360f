"""The comparison with other ways to train the same model: real processes, the smallest model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_megatron.commands.bench import main
from mone_megatron.config.load import compose
from mone_megatron.lab.benchmarks.peers.contender import Contender
from mone_megatron.lab.benchmarks.peers.products import product_shapes
from mone_megatron.lab.benchmarks.peers.task import PeerTask
from mone_megatron.planning.attention import score_flops
from mone_megatron.planning.flops import forward_flops_per_token

_VOCAB = 512
_TINY = ("experiment=tiny_moe", "device.kind=cpu", "device.threads=1")


@pytest.mark.parametrize("experiment", ["tiny_moe", "quickstart_moe", "tiny_mone"])
def test_products_are_those_that_a_step_is_counted_by(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    model, length = config.model, config.train.seq_length
    tokens = config.train.micro_batch_size * length
    shapes = product_shapes(model, tokens, _VOCAB)
    counted = forward_flops_per_token(model, config.mone, length, _VOCAB).realised
    attention = score_flops(model, length)
    products = sum(2 * rows * ins * outs * times for rows, ins, outs, times in shapes)
    assert products == tokens * (counted - attention)


@pytest.mark.parametrize(
    "change", [{"num_experts": 0}, {"first_dense_layers": 1}, {"shared_expert_gate": True}]
)
def test_a_model_of_another_kind_is_told_in_one_line(change: dict[str, Any]) -> None:
    config = compose(_TINY)
    config = replace(config, model=replace(config.model, **change))
    with Contender("products") as contender:
        with pytest.raises(ValueError, match=r"experts in every layer|counts other products"):
            contender.open(PeerTask(config, _VOCAB))
        # The process goes on.
        task = PeerTask(compose(_TINY), _VOCAB)
        assert contender.open(task) == 0
        assert contender.run(1).clock > 0
        assert contender.peak_megabytes() > 50


def test_all_train_the_same_model_from_the_same_loss(tmp_path: Path) -> None:
    output = tmp_path / "peers.json"
    arguments = ["peers", "--moe", "tiny_moe", "--mone", "tiny_mone", "--output", str(output)]
    arguments += ["--repeats", "1", "--experts", "4", "--micro-batch", "--layers", "--starts", "1"]
    threads = torch.get_num_threads()
    try:
        assert main([*arguments, f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(output.read_text(encoding="utf-8"))["result"]
    first, second = result["cells"]
    assert (first["size"], second["size"]) == ("", "experts 4")
    for cell in (first, second):
        parameters = cell["parameters"]
        assert parameters["MoE"] == parameters["MoNE"] == parameters["transformers"]
        # The balance of experts is in transformers' loss, too.
        assert cell["losses"]["transformers"] == pytest.approx(cell["losses"]["MoE"], abs=0.2)
        assert 4 < cell["losses"]["MoNE"] < math.log(1024)
        assert all(0 < ratio["processor"]["median"] < math.inf for ratio in cell["ratios"])
        assert len(cell["ratios"]) == 6
    assert second["parameters"]["MoE"] < first["parameters"]["MoE"]
    assert set(result["growth"]) == {"experts 4"}
    assert set(result["implementations"]) == {"eager", "grouped_mm", "batched_mm"}
    assert all(megabytes > 50 for megabytes in result["peak_megabytes"].values())
    assert result["starts"]["tiny_moe"]["median"] > 0
    assert result["starts"]["transformers"]["median"] > 0
    assert output.with_suffix(".png").stat().st_size > 1000
