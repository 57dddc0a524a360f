"""Saving a run's whole state and taking it up again, on any layout.

The state is the model and the optimizer (:mod:`.state`), the step, the tokens seen, the number of
optimizer updates, and each rank's random streams. Data needs no state: the step decides which
samples come next (:mod:`mone_megatron.data.loader`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mone_megatron.checkpoint import (
    Checkpoint,
    CheckpointStore,
    FileDigest,
    digest_files,
    restricted_pickle,
    write_error,
)
from mone_megatron.config.schema import Config
from mone_megatron.train.checkpoint_state import (
    assign_optimizer_state,
    model_state,
    optimizer_state,
    optimizer_targets,
)

# Keys that must be the same for a run to go on as if it had not stopped.
_SAME_RUN = (
    "train.seed",
    "train.seq_length",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.steps",
    "data_fingerprint",
    "vocab_size",
    "dtype",
)


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    # Steps whose update was not applied (train.on_bad_loss).
    skipped: int = 0

    @property
    def updates(self) -> int:
        """Optimizer updates: what Adam counts. The schedule counts steps."""
        return self.step - self.skipped


def run_identity(
    config: Config, *, data_fingerprint: str, vocab_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to, for :func:`check_same_run`."""
    return {
        "model": asdict(config.model),
        "mone.apply_to": list(config.mone.apply_to) if config.mone.enabled else [],
        "train.seed": config.train.seed,
        "train.seq_length": config.train.seq_length,
        "train.global_batch_size": config.train.global_batch_size,
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.steps": config.train.steps,
        "data_fingerprint": data_fingerprint,
        "vocab_size": vocab_size,
        "dtype": str(dtype),
    }


def check_same_run(saved: dict[str, Any], current: dict[str, Any], where: Path) -> None:
    """Refuse a checkpoint of other data, another model or another schedule.

    Raises:
        ValueError: naming every key that differs.
    """
    problems = []
    saved_model, model = saved.get("model", {}), current["model"]
    for key, value in model.items():
        if saved_model.get(key) != _plain(value):
            problems.append(f"model.{key}: {saved_model.get(key)!r} saved, {value!r} configured")
    for key in _SAME_RUN:
        if saved.get(key) != current[key]:
            problems.append(f"{key}: {saved.get(key)!r} saved, {current[key]!r} configured")
    if problems:
        raise ValueError(
            "\n".join(
                f"{problem}; checkpoint.resume cannot go on from {where} with it changed: restore "
                "the value, or start afresh with checkpoint.resume=never"
                for problem in problems
            )
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _random_state() -> dict[str, Any]:
    """Every random stream of this process, as tensors and numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937"
    version, python_words, python_gauss = random.getstate()
    state = {
        "python_version": version,
        "python_words": torch.tensor(python_words, dtype=torch.int64),
        "python_gauss": python_gauss,
        "numpy_words": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    words = tuple(state["python_words"].tolist())
    random.setstate((state["python_version"], words, state["python_gauss"]))
    position, has_gauss, cached = state["numpy_rest"]
    keys = state["numpy_words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), float(cached)))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


class Checkpointer:
    """Saves and restores one run. Every method is collective over all ranks."""

    def __init__(
        self,
        config: Config,
        *,
        identity: dict[str, Any],
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        say: Callable[[str], None],
    ) -> None:
        """Work under ``run.dir/checkpoints``; ``identity`` is from :func:`run_identity`."""
        self.config = config
        self.identity = identity
        self.chunks = chunks
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.say = say
        self.store = CheckpointStore(Path(config.run.dir) / "checkpoints", log=say)
        # Random streams belong to a rank of a layout.
        self.layout = {"world_size": dist.get_world_size(), **asdict(config.parallel)}

    def save(self, position: Position) -> None:
        """Write a checkpoint of this step: whole and verified, or not at all.

        Raises:
            CheckpointWriteError: naming the path; the checkpoints before are untouched.
        """
        partial = self._on_rank_0(lambda: str(self.store.begin(position.step)))
        model = model_state(self.chunks)
        content: ShardedStateDict = {
            "model": model,
            "optimizer": optimizer_state(self.optimizer, model),
            "random": self._random_entry(_random_state()),
            "step": position.step,
            "tokens": position.tokens,
            "updates": position.updates,
        }
        try:
            dist_checkpointing.save(content, partial)
            dist.barrier()
            files: list[Any] = [None] * dist.get_world_size()
            mine = digest_files(
                Path(partial), rank=dist.get_rank(), world_size=dist.get_world_size()
            )
            dist.all_gather_object(files, mine)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if dist.get_rank() == 0:
                self.store.abort(Path(partial))
            if isinstance(error, CheckpointException) and error.failures:
                cause, _ = next(iter(error.failures.values()))
                raise write_error(cause, Path(partial)) from error
            raise
        facts = {
            "tokens": position.tokens,
            "identity": _plain(self.identity),
            "layout": _plain(self.layout),
        }
        merged = {name: digest for part in files for name, digest in part.items()}
        self._on_rank_0(lambda: self._commit(Path(partial), facts, merged))

    def roll_back(self) -> Position:
        """Take up the newest checkpoint of this run that verifies; there must be one.

        Raises:
            ValueError: when there is none.
        """
        if self._on_rank_0(lambda: not self.store.checkpoints()):
            raise ValueError(f"train.on_bad_loss=rollback: no checkpoint in {self.store.folder}")
        return self.resume("auto")

    def resume(self, wanted: str | None = None) -> Position:
        """Take up the checkpoint that ``checkpoint.resume`` asks for; the beginning if none.

        Args:
            wanted: instead of ``checkpoint.resume``.

        Raises:
            ValueError: for a checkpoint that is damaged or of another run.
        """
        wanted = self.config.checkpoint.resume if wanted is None else wanted
        if wanted == "never":
            return Position()
        found = self._on_rank_0(lambda: self._find(wanted))
        if found is None:
            self.say("checkpoint.resume=auto: no checkpoint yet, starting at step 0")
            return Position()
        folder, facts = found
        check_same_run(facts["identity"], self.identity, Path(folder))
        same_layout = facts["layout"] == _plain(self.layout)
        model = model_state(self.chunks)
        moments, owners = optimizer_targets(self.optimizer, model)
        content: ShardedStateDict = {"model": model, "optimizer": moments}
        if same_layout:
            content["random"] = self._random_entry(None)
        with restricted_pickle(Path(folder)):
            # Its access check is for saves: here the main replica of a tensor may not want it.
            loaded = dist_checkpointing.load(content, folder, validate_access_integrity=False)
        for number, chunk in enumerate(self.chunks):
            self._load_weights(chunk, loaded["model"][f"chunk_{number}"])
        assign_optimizer_state(loaded["optimizer"], owners, loaded["updates"])
        self.scheduler.num_steps = loaded["step"]
        self.scheduler.step(0)
        if same_layout:
            _set_random_state(loaded["random"])
        else:
            self.say("the layout changed: weights and moments are exact, dropout draws afresh")
        self.say(f"resumed from {folder} after step {loaded['step']}")
        return Position(loaded["step"], loaded["tokens"], loaded["step"] - loaded["updates"])

    @torch.no_grad()
    def _load_weights(self, chunk: DistributedDataParallel, weights: dict[str, Tensor]) -> None:
        result = unwrap_model(chunk).load_state_dict(weights, strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys

    def _random_entry(self, state: dict[str, Any] | None) -> ShardedObject:
        shape, place = (dist.get_world_size(),), (dist.get_rank(),)
        return ShardedObject("random", state, shape, place, replica_id=0)

    def _commit(self, partial: Path, facts: dict[str, Any], files: dict[str, FileDigest]) -> str:
        path = self.store.commit(partial, facts, files=files)
        keep = self.config.checkpoint
        self.store.retain(last=keep.keep_last, every=keep.keep_every)
        return str(path)

    def _find(self, wanted: str) -> tuple[str, dict[str, Any]] | None:
        checkpoint: Checkpoint | None
        if wanted == "auto":
            self.store.clean()
            checkpoint = self.store.newest_verified()
        else:
            checkpoint = self.store.open(Path(wanted))
        return (str(checkpoint.path), dict(checkpoint.facts)) if checkpoint else None

    def _on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run on rank 0 and tell the others what came out; an error is raised on all."""
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome[0] = action()
            except (OSError, ValueError) as error:
                outcome[1] = f"{error}"
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]
