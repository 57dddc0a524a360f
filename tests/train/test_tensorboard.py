"""What TensorBoard shows of a run is what metrics.jsonl holds, also after resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python
from mone_megatron.train.hooks.tensorboard import TensorBoardHook

RUN = ("experiment=tiny_mone", "device=cpu", "device.threads=1", "logging.tensorboard=true")


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value, as TensorBoard reads the files."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_a_run_is_shown_as_it_is_recorded(tmp_path: Path) -> None:
    quiet = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
    overrides = (*RUN, *quiet, "train.steps=2", f"run.dir={tmp_path}/run")
    arguments = ["-m", "mone_megatron.pretrain", *overrides]
    run_python(arguments, folder=REPOSITORY).check_returncode()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = shown(tmp_path / "run")
    for record in map(json.loads, lines):
        for name in record.keys() - {"step"}:
            assert found[name][record["step"]] == pytest.approx(record[name], rel=1e-6)
    assert set(found["loss"]) == {1, 2}


@pytest.mark.parametrize("how", ["resumed", "rolled back"])
def test_steps_that_come_anew_are_shown_once(how: str, tmp_path: Path) -> None:
    config = compose([*RUN, "logging.interval=1"])
    hook = TensorBoardHook(config, tmp_path, step=0)
    hook.on_start()
    for step in range(1, 6):
        hook.on_step({"step": step, "loss": float(step)})
    if how == "resumed":
        hook.on_end("interrupted")
        hook = TensorBoardHook(config, tmp_path, step=3)
        hook.on_start()
    else:
        hook.on_rollback(3)
    hook.on_step({"step": 4, "loss": 40.0})
    hook.on_end("completed")
    assert shown(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}}


def test_without_the_package_it_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mone_megatron.config.logging.is_installed", lambda package: False)
    with pytest.raises(ValueError, match=r"^logging.tensorboard: needs the package tensorboard"):
        validate(compose(RUN), world_size=1)
