from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from mone_megatron.config.load import compose
from mone_megatron.kernels.reference import topk_mask
from mone_megatron.lab.benchmarks import ranks
from mone_megatron.lab.benchmarks.layer import LayerShape, measure_layer
from mone_megatron.lab.benchmarks.select import kthvalue_mask, measure_select, topk_scatter
from mone_megatron.testing.warm_start import run_python

REPOSITORY = Path(__file__).resolve().parents[3]


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/bench.py", *arguments], folder=REPOSITORY, timeout=300)


def test_the_masks_it_compares_with_are_right_without_ties() -> None:
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    for rival in (topk_scatter, kthvalue_mask):
        assert torch.equal(rival(scores, 7), topk_mask(scores, 7))


def test_the_grid_is_whole() -> None:
    cells = measure_select([2, 3], [4, 8], 0.25, repeats=1)
    assert [(c.rows, c.neurons, c.kept) for c in cells] == [
        (2, 4, 1),
        (2, 8, 2),
        (3, 4, 1),
        (3, 8, 2),
    ]
    with pytest.raises(ValueError, match="keep-ratio"):
        measure_select([2], [4], 1.5, repeats=1)


def test_spine_and_cost_measure_real_steps(tmp_path: Path) -> None:
    own = (f"data.cache_dir={tmp_path / 'cache'}", "device.threads=1")
    output = tmp_path / "spine.json"
    done = _bench("spine", "--repeats", "1", "--steps", "1", "--output", str(output), *own)
    assert done.returncode == 0, done.stderr
    spine = json.loads(output.read_text())
    assert spine["benchmark"] == "spine"
    assert spine["result"]["throughput_ratio"]["median"] > 0
    assert "torch" in spine["versions"]

    output = tmp_path / "cost.json"
    tiny = ("--moe", "tiny_moe", "--mone", "tiny_mone", "--repeats", "1", "--part-repeats", "2")
    done = _bench("cost", *tiny, "--processes", "2", "--output", str(output), *own)
    assert done.returncode == 0, done.stderr
    cost = json.loads(output.read_text())["result"]
    assert cost["step_ratio"]["median"] > 0
    assert len(cost["parts"]) == 6
    share = sum(part["share_of_step"] for part in cost["parts"] if "metrics" in part["name"])
    assert cost["panel_share_of_step"] == pytest.approx(share / 10)
    assert cost["neurons"] == 64
    assert "MoNE / MoE, step time" in done.stdout


def test_a_layer_in_every_way(tmp_path: Path) -> None:
    shape = LayerShape(hidden=64, neurons=32, experts=4, chosen=2, tokens=48)
    result = measure_layer(shape, 0.25, repeats=1, device=torch.device("cpu"))
    saved = {cost.name: cost.saved_megabytes for cost in result.costs}
    rows = 48 * 2
    # Gates, activations, up and hidden values in fp32; packed: a quarter of gate and up, and a bit
    # a neuron.
    assert saved["MoE"] == pytest.approx(rows * 4 * 32 * 4 / 1e6, rel=0.01)
    segments = 4 * (32 + rows) * 4
    assert saved["MoNE, packed memory"] <= (rows * (2 * 8 * 4 + 4) + segments) / 1e6
    assert all(cost.over_moe.median > 0 for cost in result.costs)
    with pytest.raises(ValueError, match="--keep-ratio"):
        measure_layer(shape, 1.0, repeats=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="--chosen: 5 of --experts=4"):
        LayerShape(hidden=64, neurons=32, experts=4, chosen=5, tokens=48)


def test_train_decode_and_generate_write_results(tmp_path: Path) -> None:
    sizes = ("--hidden", "128", "--neurons", "32", "--experts", "4", "--chosen", "2")
    own = (f"data.cache_dir={tmp_path / 'cache'}", "device.threads=1")
    tiny = ("--moe", "tiny_moe", "--mone", "tiny_mone", "--repeats", "1", *own)
    written = {}
    for name, arguments in {
        "train": tiny,
        "decode": (*sizes, "--batch", "1", "2", "--repeats", "1"),
        "generate": (*sizes, "--layers", "1", "--new-tokens", "3", "--repeats", "1"),
    }.items():
        output = tmp_path / f"{name}.json"
        done = _bench(name, *arguments, "--output", str(output))
        assert done.returncode == 0, done.stderr
        written[name] = json.loads(output.read_text())["result"]
    costs = {cost["name"]: cost for cost in written["train"]["costs"]}
    assert costs["MoE"]["over_moe"]["median"] == 1
    assert len(costs) == 4
    cells = written["decode"]["cells"]
    assert [(cell["tokens"], cell["keep_ratio"]) for cell in cells] == [
        (1, 0.125),
        (1, 0.25),
        (2, 0.125),
        (2, 0.25),
    ]
    assert cells[1]["limit"] == pytest.approx(2.0)
    assert 0 < written["generate"]["experts_share"] < 1
    for name in ("train", "decode"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["select", "train", "cost", "spine", "save"])
def test_a_gpu_that_is_not_there_is_one_line(name: str) -> None:
    done = _bench(name, "--device", "cuda")
    assert done.returncode == 2
    # Other problems have lines of their own.
    assert len([line for line in done.stderr.splitlines() if "device.kind" in line]) == 1
    assert "Traceback" not in done.stderr


def test_ranks_on_gpus_are_those_that_were_started() -> None:
    config = compose(["experiment=tiny_mone", "device.kind=cuda"])
    with pytest.raises(ValueError, match="--processes: 2 on GPUs, and 1 were started"):
        ranks.run_save(config, 2, repeats=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_select_on_a_gpu() -> None:
    grid = ("--rows", "512", "--neurons", "1024", "--repeats", "2", "--dtype", "bf16")
    done = _bench("select", "--device", "cuda", *grid)
    assert done.returncode == 0, done.stderr


def test_no_threads_below_0() -> None:
    done = _bench("layer", "--threads", "-3")
    assert done.returncode == 2
    assert "--threads: must be 0 or more" in done.stderr


def test_a_layout_that_cannot_be_is_one_line() -> None:
    done = _bench("cost", "--processes", "3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "parallel.expert" in done.stderr
    assert "Traceback" not in done.stderr
