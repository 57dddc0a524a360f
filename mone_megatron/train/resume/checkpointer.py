"""Saving a run's whole state and taking it up again, on any layout.

The state is the model and the optimizer (:mod:`.saved_state`), the step, the tokens and
samples seen, the number of optimizer updates, the learning-rate schedule, each rank's random
streams, and what hooks keep; the configuration and the tokenizer lie beside it. Data needs no other
state: the step decides which samples come next (:mod:`mone_megatron.data.loader`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mone_megatron.checkpoint import (
    Checkpoint,
    CheckpointStore,
    CheckpointWriteError,
    FileDigest,
    digest_file,
    write_error,
)
from mone_megatron.checkpoint.facts import ORIGIN
from mone_megatron.config.load import to_yaml
from mone_megatron.config.schema import Config
from mone_megatron.data.framing import Framing
from mone_megatron.data.tokenizer import copy_tokenizer
from mone_megatron.megatron_release import megatron_release
from mone_megatron.os_errors import readable
from mone_megatron.parallel.device import numbers_on
from mone_megatron.parallel.megatron_compat.checkpoint_forms import own_writer
from mone_megatron.train.resume.identity import check_same_run, require_run
from mone_megatron.train.resume.initial_weights import initialize
from mone_megatron.train.resume.random_state import missing_streams, random_state, set_random_state
from mone_megatron.train.resume.reading import (
    Check,
    broadcast,
    fill_chunk,
    find,
    find_at,
    incomplete,
    load,
    union,
)
from mone_megatron.train.resume.saved_state import (
    assign_optimizer_state,
    model_state,
    optimizer_state,
    optimizer_targets,
)
from mone_megatron.train.resume.writing import BackgroundSave
from mone_megatron.train.state import TrainingState

_NEEDED_FOR = (
    "the run cannot go on from it exactly: use another checkpoint with checkpoint.resume=PATH"
)
# A state of nothing, as JSON.
_NOTHING = "{}"


@dataclass(frozen=True)
class Position:
    """Says how far a run has come."""

    step: int = 0
    tokens: int = 0
    # Steps whose update was not applied (train.on_bad_loss).
    skipped: int = 0

    @property
    def updates(self) -> int:
        """Returns how often the optimizer updated, which Adam counts; the schedule counts steps."""
        return self.step - self.skipped


class Keeper(Protocol):
    """Has something of its own in each checkpoint: plain values, the same on every rank."""

    def state(self) -> dict[str, Any]:
        """Returns numbers, texts, lists and dictionaries of these."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""


@dataclass(frozen=True)
class _Pending:
    """Holds a save that is being written."""

    position: Position
    partial: Path
    saving: BackgroundSave


class Checkpointer:
    """Saves and restores one run. Every method is collective over all ranks, but those that say
    otherwise."""

    def __init__(
        self,
        config: Config,
        *,
        identity: dict[str, Any],
        state: TrainingState,
        tokenizer_dir: Path | None,
        framing: Framing | None = None,
        say: Callable[[str], None],
    ) -> None:
        """Touches nothing yet.

        Args:
            config: validated; the store is ``run.dir/checkpoints``.
            identity: from :func:`~mone_megatron.train.resume.identity.run_identity`.
            state: what is saved and restored.
            tokenizer_dir: goes into each checkpoint; None for none.
            framing: of the data's documents, goes into each checkpoint; None for none.
            say: tells the user, once.
        """
        self.config = config
        self.identity = identity
        self.state = state
        self.tokenizer_dir = tokenizer_dir
        self.framing = framing
        self.say = say
        self.store = CheckpointStore(Path(config.run.dir) / "checkpoints", log=say)
        # Random streams belong to a rank of a layout.
        self.layout = {"world_size": dist.get_world_size(), **asdict(config.parallel)}
        # What model of others the run began as, from the checkpoint that it began with.
        self._origin: dict[str, Any] | None = None
        self._pending: _Pending | None = None
        self._access_checked = False
        self._blocked_seconds = 0.0
        # Whoever keeps something in the checkpoints, with what it began with, as JSON.
        self._keepers: dict[str, tuple[Keeper, str]] = {}
        # The checkpoint that was taken up last, and what it holds of each.
        self._taken_up: Path | None = None
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, keeper: Keeper) -> None:
        """Saves the state of ``keeper`` with every checkpoint from now on. Not collective.

        It is given at once what the checkpoint holds that the run goes on from, and again after
        every rollback.

        Raises:
            ValueError: the state is not made of plain values.
        """
        self._keepers[name] = (keeper, _as_json(name, keeper))
        if name in self._kept:
            keeper.set_state(self._kept[name])
        elif self._taken_up is not None and self._keepers[name][1] != _NOTHING:
            self.say(f"{name} begins anew: {self._taken_up} holds nothing of it")

    # Saving

    def save(self, position: Position) -> None:
        """Writes a checkpoint of this step: whole and verified, or not at all.

        With ``checkpoint.async_save`` this returns when the state is handed to the processes that
        write it; :meth:`finish` makes it a checkpoint. A save that is still being written is
        finished first.

        Raises:
            CheckpointWriteError: naming the path; the checkpoints before are untouched.
        """
        self.finish()
        with self._blocking():
            self._start(position)
        if not self.config.checkpoint.async_save:
            self.finish()

    def read(self, device: torch.device) -> Tensor:
        """Returns ``[1]``, to be summed: whether this rank still writes. Not collective."""
        writing = self._pending is not None and not self._pending.saving.ended
        return numbers_on(device, float(writing))

    def advance(self, writing: Tensor) -> None:
        """Finishes a save that every rank has written.

        Args:
            writing: the sum over ranks of :meth:`read`.

        Raises:
            CheckpointWriteError: see :meth:`finish`.
        """
        if self._pending is not None and writing.sum() == 0:
            self.finish()

    def finish(self) -> None:
        """Waits for the save that is being written, if any, and makes it the newest checkpoint.

        Raises:
            CheckpointWriteError: on every rank, when it failed on one; nothing of it is left.
        """
        if self._pending is None:
            return
        with self._blocking():
            pending, self._pending = self._pending, None
            self._finish(pending)

    def abandon(self) -> None:
        """Gives up a save that is being written. Not collective: for a run that failed."""
        if self._pending is not None:
            self._pending.saving.kill()
            if dist.get_rank() == 0:
                self.store.abort(self._pending.partial)
            self._pending = None

    @property
    def is_saving(self) -> bool:
        """Returns whether a save is not finished, the same on every rank. Not collective."""
        return self._pending is not None

    @property
    def writer_pid(self) -> int | None:
        """Returns the id of this rank's process that writes, if one does. Not collective."""
        return None if self._pending is None else self._pending.saving.pid

    def take_blocked_seconds(self) -> float:
        """Returns how long training stood still for saves since the last call. Not collective."""
        seconds, self._blocked_seconds = self._blocked_seconds, 0.0
        return seconds

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._blocked_seconds += time.perf_counter() - started

    def _start(self, position: Position) -> None:
        partial = Path(self._on_rank_0(lambda: str(self.store.begin(position.step))))
        model = model_state(self.state.chunks)
        content: ShardedStateDict = {
            "model": model,
            "optimizer": optimizer_state(self.state.optimizer, model),
            "random": self._random_entry(random_state()),
            "step": position.step,
            "tokens": position.tokens,
            "samples": position.step * self.config.train.global_batch_size,
            "updates": position.updates,
            "schedule": self.state.scheduler.state_dict(),
        }
        states = {name: _as_json(name, keeper) for name, (keeper, _) in self._keepers.items()}
        # Where nothing is kept a checkpoint is as it was before there were hooks with a state.
        if kept := {name: text for name, text in states.items() if text != _NOTHING}:
            content["hooks"] = kept
        with self._giving_up(partial):
            request = dist_checkpointing.save(
                content,
                str(partial),
                async_sharded_save=True,
                # Whether every element is saved exactly once does not change between saves.
                validate_access_integrity=not self._access_checked,
                **own_writer(),
            )
            self._access_checked = True
            assert request is not None
            self._pending = _Pending(position, partial, BackgroundSave(request))

    def _finish(self, pending: _Pending) -> None:
        saving, partial = pending.saving, pending.partial
        saving.wait()
        error = saving.error()
        outcomes: list[tuple[CheckpointWriteError | None, dict[str, FileDigest]] | None]
        outcomes = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (error, {} if error else saving.digests()))
        files: dict[str, FileDigest] = {}
        for outcome in outcomes:
            assert outcome is not None
            if outcome[0] is not None:
                if dist.get_rank() == 0:
                    self.store.abort(partial)
                raise outcome[0]
            files |= outcome[1]
        with self._giving_up(partial):
            saving.finalize()
        facts = {
            "tokens": pending.position.tokens,
            "identity": self.identity,
            "layout": self.layout,
            "megatron-core": ".".join(map(str, megatron_release())),
        }
        if self.framing is not None:
            facts["framing"] = self.framing.as_facts()
        if self._origin is not None:
            facts[ORIGIN] = self._origin
        self._on_rank_0(lambda: self._commit(partial, facts, files))

    @cached_property
    def _config_yaml(self) -> str:
        """Returns the run's configuration as text, which is the same in every checkpoint."""
        return to_yaml(self.config)

    def _commit(self, partial: Path, facts: dict[str, Any], files: dict[str, FileDigest]) -> None:
        """Adds what people and other programs read, and the metadata's digests; on rank 0."""
        try:
            (partial / "config.yaml").write_text(self._config_yaml, encoding="utf-8")
            if self.tokenizer_dir is not None:
                copy_tokenizer(self.tokenizer_dir, partial / "tokenizer")
            for path in partial.rglob("*"):
                name = path.relative_to(partial).as_posix()
                if name not in files and path.is_file():
                    files[name] = digest_file(path, sync=True)
        except OSError as error:
            self.store.abort(partial)
            raise write_error(error, partial) from error
        self.store.commit(partial, facts, files=files)
        keep = self.config.checkpoint
        self.store.retain(last=keep.keep_last, every=keep.keep_every)

    @contextmanager
    def _giving_up(self, partial: Path) -> Iterator[None]:
        """Removes the save on an error inside, and tells what could not be written."""
        try:
            yield
        except BaseException as error:  # torch's CheckpointException is no Exception
            if dist.get_rank() == 0:
                self.store.abort(partial)
            if isinstance(error, CheckpointException) and error.failures:
                cause, _ = next(iter(error.failures.values()))
                raise write_error(cause, partial) from error
            if isinstance(error, OSError):
                raise write_error(error, partial) from error
            raise

    # Taking up

    def roll_back(self) -> Position:
        """Takes up the newest checkpoint of this run that verifies; there must be one.

        Raises:
            ValueError: when there is none.
        """
        self.finish()
        if self._on_rank_0(lambda: not self.store.checkpoints()):
            raise ValueError(f"train.on_bad_loss=rollback: no checkpoint in {self.store.folder}")
        return self._resume("auto")

    def resume(self) -> Position:
        """Takes up the checkpoint that ``checkpoint.resume`` asks for; the beginning if none.

        The beginning has the weights of ``checkpoint.initialize``, if that is set.

        Raises:
            ValueError: for a checkpoint that is damaged, incomplete or of another run.
        """
        return self._resume(self.config.checkpoint.resume)

    def _resume(self, wanted: str) -> Position:
        if wanted == "never":
            return self._begin()
        if wanted == "auto":
            found = find(self._look)
        else:
            with readable(f"checkpoint.resume={wanted}"):
                found = find_at(Path(wanted))
        if found is None:
            self.say("checkpoint.resume=auto: no checkpoint yet, starting at step 0")
            return self._begin()
        folder, facts = found
        if self.config.checkpoint.initialize:
            self.say("checkpoint.initialize: not used, since the run has checkpoints of its own")
        chosen = wanted != "auto"
        require_run(facts, folder)
        check_same_run(facts["identity"], self.identity, folder, chosen=chosen, say=self.say)
        same_layout = facts["layout"] == self.layout
        model = model_state(self.state.chunks)
        moments, owners = optimizer_targets(self.state.optimizer, model)
        content: ShardedStateDict = {"model": model, "optimizer": moments}
        if same_layout:
            content["random"] = self._random_entry(None)
        loaded = load(folder, content, needed_for=_NEEDED_FOR)
        position = self._position(folder, loaded)
        if same_layout and (lacking := union(missing_streams(loaded["random"]))):
            raise incomplete(folder, [f"random.{name}" for name in lacking], _NEEDED_FOR)
        for number, chunk in enumerate(self.state.chunks):
            fill_chunk(chunk, loaded["model"][f"chunk_{number}"])
        assign_optimizer_state(loaded["optimizer"], owners, position.updates)
        self.state.scheduler.num_steps = position.step
        self.state.scheduler.step(0)
        if same_layout:
            set_random_state(loaded["random"])
        else:
            self.say("the layout changed: weights and moments are exact, dropout draws afresh")
        self._origin = facts.get(ORIGIN)
        self._taken_up = folder
        self._kept = {name: json.loads(text) for name, text in loaded.get("hooks", {}).items()}
        for name, (keeper, initial) in self._keepers.items():
            keeper.set_state(self._kept.get(name, json.loads(initial)))
        self.say(f"resumed from {folder} after step {position.step}")
        return position

    def _begin(self) -> Position:
        if path := self.config.checkpoint.initialize:
            with readable(f"checkpoint.initialize={path}"):
                facts = initialize(
                    self.state,
                    Path(path),
                    identity=self.identity,
                    framing=self.framing,
                    say=self.say,
                )
            self._origin = facts.get(ORIGIN)
        return Position()

    def _position(self, folder: Path, loaded: dict[str, Any]) -> Position:
        needed = ("step", "tokens", "samples", "updates", "schedule")
        if missing := [name for name in needed if name not in loaded]:
            raise incomplete(folder, missing, _NEEDED_FOR)
        step = loaded["step"]
        for name, expected in (
            ("samples", step * self.config.train.global_batch_size),
            ("schedule.num_steps", step),
        ):
            found = loaded["schedule"].get("num_steps") if "." in name else loaded[name]
            if found != expected:
                raise ValueError(
                    f"checkpoint {folder}: {name} is {found} after step {step}, not {expected}; "
                    "use another checkpoint with checkpoint.resume=PATH"
                )
        return Position(step, loaded["tokens"], step - loaded["updates"])

    def _random_entry(self, state: dict[str, Any] | None) -> ShardedObject:
        shape, place = (dist.get_world_size(),), (dist.get_rank(),)
        return ShardedObject("random", state, shape, place, replica_id=0)

    # Finding

    def _look(self, check: Check) -> Checkpoint | None:
        """Returns what ``checkpoint.resume=auto`` goes on from; on rank 0."""
        self.store.clean()
        return self.store.newest_verified(check=check)

    def _on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Runs on rank 0 and tells the others what came out; an error is raised on all."""
        outcome: tuple[Exception | None, Any] = (None, None)
        if dist.get_rank() == 0:
            try:
                outcome = (None, action())
            except (OSError, ValueError) as error:
                outcome = (error, None)
        problem, result = broadcast(outcome)
        if problem is not None:
            raise problem
        return result


def _as_json(name: str, keeper: Keeper) -> str:
    state = keeper.state()
    try:
        return json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train.hooks: {name} has a state that no checkpoint can hold ({error}); have its "
            "state() give numbers, texts, lists and dictionaries of these"
        ) from None
