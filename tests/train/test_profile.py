"""train.profile: a trace of some steps, and no difference to the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.testing.launch import run_layouts

TINY = [
    "experiment=tiny_mone", "device=cpu", "device.threads=1",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false",
]  # fmt: skip


def test_two_steps_are_traced_on_rank_0(tmp_path: Path) -> None:
    steps = [*TINY, "train.steps=8"]
    run_layouts(
        {"plain": steps, "profiled": [*steps, "train.profile=2"]}, processes=2, folder=tmp_path
    )
    folder = tmp_path / "profiled" / "profile"
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert sorted(name for name in names if name.startswith("ProfilerStep#")) == [
        "ProfilerStep#4",
        "ProfilerStep#5",
    ]
    assert names.count("step: optimizer") == 2
    table = (folder / "operations.txt").read_text(encoding="utf-8")
    # The experts' products: one compiled function, or one a product where nothing compiles.
    assert "TokensThroughExperts" in table or "_GroupedProduct" in table
    assert "step: forward and backward" in table
    # One rank's trace; and the run is the same.
    assert sorted(path.name for path in folder.iterdir()) == ["operations.txt", "trace.json.gz"]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
        for run in ("plain", "profiled")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / "profile").exists()


def test_more_steps_than_there_are_is_refused() -> None:
    config = compose([*TINY, "train.steps=8", "train.profile=5"])
    with pytest.raises(ConfigError, match=r"train\.profile: 5 steps .* or at most 4"):
        validate(config, world_size=1, num_devices=0, local_world_size=1)
    validate(
        compose([*TINY, "train.steps=8", "train.profile=4"]),
        world_size=1,
        num_devices=0,
        local_world_size=1,
    )
