"""``checkpoint.initialize``: a new run begins with a checkpoint's weights, on any layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mone_megatron.checkpoint import CheckpointStore
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches
from mone_megatron.train.resume.checkpointer import Position
from mone_megatron.train.resume.saved_state import (
    MASTER,
    model_state,
    optimizer_state,
    parameter_states,
)

# With a state that is no parameter: the expert bias.
TINY = (
    "experiment=tiny_mone",
    "device=cpu",
    "model.num_layers=2",
    "model.router.score_function=sigmoid",
    "model.router.expert_bias=true",
)
# What a new run may have otherwise.
ANOTHER_RUN = (
    "optim.lr=1e-3",
    "train.seed=7",
    "train.steps=9",
    "mone.balance.coeff=0.1",
    "model.init_std=0.5",
    "model.router.balance_coeff=[0.5]",
)
LAYOUTS = {
    "ep2": ("parallel.expert=2",),
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.pipeline=2",),
    "dp2_without_distributed_optimizer": ("parallel.distributed_optimizer=false",),
}
WEIGHT = "decoder.layers.1.mlp.experts.down_weight"
BIAS = "decoder.layers.1.mlp.router.expert_bias"


def _train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.stepper.train(random_batches(trainer)).loss for _ in range(steps)]


def save_a_run(
    folder: str, overrides: tuple[str, ...] = (), dtype: torch.dtype = torch.float32
) -> float:
    """Train two steps, save, and tell the loss of the third."""
    trainer = build_trainer(
        (*TINY, *overrides, f"run.dir={folder}"), data_fingerprint="none", dtype=dtype
    )
    _train(trainer, 2)
    trainer.checkpointer.save(Position(step=2, tokens=1024))
    return _train(trainer, 1)[0]


def begin(source: str, folder: str, overrides: tuple[str, ...] = ()) -> list[float]:
    """Begin another run with the checkpoint's weights; its first losses."""
    told: list[str] = []
    trainer = build_trainer(
        (*TINY, *ANOTHER_RUN, *overrides, f"run.dir={folder}", f"checkpoint.initialize={source}"),
        data_fingerprint="other",
        say=told.append,
    )
    assert trainer.checkpointer.resume() == Position()
    assert told == [f"begins with the weights of {source}"]
    assert trainer.state.scheduler.num_steps == 0
    for state in parameter_states(trainer.state.optimizer):
        moment = state.tensor("exp_avg")
        assert moment is None or not moment.any()
    return _train(trainer, 3)


@pytest.fixture(scope="module")
def one() -> Any:
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def source(one: Processes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint, and the loss of the step after it."""
    folder = tmp_path_factory.mktemp("source")
    (loss,) = one.run(save_a_run, str(folder))
    return folder / "checkpoints" / "step_00000002", loss


@pytest.fixture(scope="module")
def alone(one: Processes, source: tuple[Path, float], tmp_path_factory: Any) -> list[float]:
    """First losses of a new run on one process."""
    (losses,) = one.run(begin, str(source[0]), str(tmp_path_factory.mktemp("alone")))
    return losses


def test_the_first_loss_is_that_of_the_checkpoint(
    source: tuple[Path, float], alone: list[float]
) -> None:
    assert alone[0] == pytest.approx(source[1], rel=1e-6)
    assert alone[2] < alone[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_begin_alike(
    two_processes: Processes,
    source: tuple[Path, float],
    alone: list[float],
    tmp_path: Path,
    name: str,
) -> None:
    # Later steps are those of the same masters and moments.
    for losses in two_processes.run(begin, str(source[0]), str(tmp_path), LAYOUTS[name]):
        assert losses == pytest.approx(alone, rel=1e-6)


def test_a_checkpoint_of_another_layout(
    one: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    loss, _ = two_processes.run(save_a_run, str(tmp_path), LAYOUTS["ep2"])
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    (losses,) = one.run(begin, str(checkpoint), str(tmp_path / "run"))
    assert losses[0] == pytest.approx(loss, rel=1e-6)


def _saved(checkpoint: Path) -> dict[str, Tensor]:
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(checkpoint))
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def begin_in(source: str, overrides: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights and masters of a run before its first step, whole (one process)."""
    trainer = build_trainer(
        (*TINY, *overrides, f"checkpoint.initialize={source}"), data_fingerprint="", dtype=dtype
    )
    trainer.checkpointer.resume()
    model = model_state(trainer.chunks)
    entries = {entry.key: entry for entry in model["chunk_0"].values()}
    entries |= {one.key: one for one in optimizer_state(trainer.state.optimizer, model).values()}
    return {key: entry.data.detach().clone() for key, entry in entries.items()}


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_fp32_weights_become_the_masters_of_a_bf16_run(
    one: Processes, source: tuple[Path, float], distributed: str
) -> None:
    overrides = (f"parallel.distributed_optimizer={distributed}",)
    (begun,) = one.run(begin_in, str(source[0]), overrides, torch.bfloat16)
    saved = _saved(source[0])
    for name in (WEIGHT, "embedding.word_embeddings.weight"):
        assert torch.equal(begun[f"optimizer.{MASTER}.{name}"], saved[name])
        assert torch.equal(begun[name], saved[name].bfloat16())
        assert not torch.equal(begun[name].float(), saved[name])
    assert begun[BIAS].any()
    assert torch.equal(begun[BIAS], saved[BIAS])


def test_masters_become_the_weights_of_an_fp32_run(one: Processes, tmp_path: Path) -> None:
    one.run(save_a_run, str(tmp_path), (), torch.bfloat16)
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    saved = _saved(checkpoint)
    assert saved[WEIGHT].dtype is torch.bfloat16
    (begun,) = one.run(begin_in, str(checkpoint), (), torch.float32)
    assert torch.equal(begun[WEIGHT], saved[f"optimizer.{MASTER}.{WEIGHT}"])
    (begun,) = one.run(begin_in, str(checkpoint), (), torch.bfloat16)
    master = f"optimizer.{MASTER}.{WEIGHT}"
    assert torch.equal(begun[master], saved[master])
    assert torch.equal(begun[WEIGHT], saved[WEIGHT])


def save_weights(
    folder: str, dtype: str, change: Callable[[dict[str, Any]], None], change_facts: Any = None
) -> None:
    """Write what an import is: the weights alone, and of the run only the model."""
    trainer = build_trainer(TINY, data_fingerprint="none")
    model = model_state(trainer.chunks)
    change(model["chunk_0"])
    identity = {
        key: value
        for key, value in trainer.checkpointer.identity.items()
        if key.startswith("model.") or key == "vocab_size"
    }
    store = CheckpointStore(Path(folder) / "checkpoints", log=print)
    partial = store.begin(0)
    dist_checkpointing.save({"model": model, "step": 0}, str(partial))
    if change_facts is not None:
        change_facts(partial)
    store.commit(partial, {"identity": identity | {"dtype": dtype}})


def _nothing(entries: dict[str, Any]) -> None:
    pass


def _without_a_weight(entries: dict[str, Any]) -> None:
    for name in [name for name, entry in entries.items() if entry.key == WEIGHT]:
        del entries[name]


def _of_another_shape(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        if entry.key == "embedding.word_embeddings.weight":
            entry.data = entry.data[:384]
            entry.local_shape, entry.global_shape = (384, 64), (384, 64)


class _Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def _hostile(partial: Path) -> None:
    torch.save({"step": _Hostile(str(partial.parent / "was-here"))}, partial / "common.pt")


def resume_from(path: str, key: str, overrides: tuple[str, ...] = ()) -> str:
    """What is said when a run cannot take up a checkpoint."""
    trainer = build_trainer((*TINY, *overrides, f"checkpoint.{key}={path}"), data_fingerprint="")
    before = [weight.clone() for weight in trainer.chunks[0].parameters()]
    with pytest.raises(ValueError, match="checkpoint") as refused:
        trainer.checkpointer.resume()
    now = trainer.chunks[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    return str(refused.value)


def test_weights_alone_are_enough(one: Processes, tmp_path: Path) -> None:
    one.run(save_weights, str(tmp_path), "torch.float32", _nothing)
    checkpoint = tmp_path / "checkpoints" / "step_00000000"
    (losses,) = one.run(begin, str(checkpoint), str(tmp_path / "run"))
    # Random weights, a vocabulary of 512.
    assert losses[0] == pytest.approx(6.24, abs=0.1)
    (said,) = one.run(resume_from, str(checkpoint), "resume")
    assert "holds weights only" in said
    assert f"checkpoint.initialize={checkpoint}" in said


@pytest.mark.parametrize(
    ("change", "change_facts", "named"),
    [
        (_without_a_weight, None, f"holds no {WEIGHT}; "),
        (
            _of_another_shape,
            None,
            "embedding.word_embeddings.weight is [384, 64], not [512, 64]",
        ),
        (_nothing, _hostile, "common.pt"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(
    one: Processes,
    two_processes: Processes,
    tmp_path: Path,
    change: Any,
    change_facts: Any,
    named: str,
) -> None:
    one.run(save_weights, str(tmp_path), "torch.float32", change, change_facts)
    checkpoint = tmp_path / "checkpoints" / "step_00000000"
    # On every rank, also on those whose part of the model it is not.
    for said in two_processes.run(
        resume_from, str(checkpoint), "initialize", ("parallel.pipeline=2",)
    ):
        assert named in said
    assert not (tmp_path / "checkpoints" / "was-here").exists()


def test_another_model_is_refused(
    one: Processes, source: tuple[Path, float], tmp_path: Path
) -> None:
    overrides = ("model.norm_eps=1e-5", "model.tie_embeddings=true")
    (said,) = one.run(resume_from, str(source[0]), "initialize", overrides)
    lines = said.splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.norm_eps", "model.tie_embeddings"]
    assert lines[1].endswith("use model.tie_embeddings=false")


def test_damage_is_refused(one: Processes, source: tuple[Path, float], tmp_path: Path) -> None:
    one.run(save_weights, str(tmp_path), "torch.float32", _nothing)
    checkpoint = tmp_path / "checkpoints" / "step_00000000"
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (said,) = one.run(resume_from, str(checkpoint), "initialize")
    assert file.name in said


def start_or_go_on(source: str, folder: str) -> tuple[list[str], int, float]:
    """What a requeued command line does each time: what it says, and the loss of a step."""
    told: list[str] = []
    trainer = build_trainer(
        (
            *TINY,
            f"run.dir={folder}",
            f"checkpoint.initialize={source}",
            "checkpoint.resume=auto",
        ),
        data_fingerprint="",
        say=told.append,
    )
    start = trainer.checkpointer.resume()
    if start == Position():
        _train(trainer, 1)
        trainer.checkpointer.save(Position(step=1, tokens=512))
    return told, start.step, _train(trainer, 1)[0]


def test_a_requeued_run_goes_on_from_its_own(
    one: Processes, source: tuple[Path, float], tmp_path: Path
) -> None:
    ((told, start, loss),) = one.run(start_or_go_on, str(source[0]), str(tmp_path))
    assert start == 0
    assert told[-1] == f"begins with the weights of {source[0]}"
    ((told, start, again),) = one.run(start_or_go_on, str(source[0]), str(tmp_path))
    assert start == 1
    assert again == loss
    assert told[0] == "checkpoint.initialize: not used, since the run has checkpoints of its own"
    assert "step_00000001" in told[-1]
