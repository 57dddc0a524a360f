"""A rank that hangs, or loses another: say which rank is at fault, keep all stacks, end.

Every rank tells the others about once a second, through the run's store, how far it is
(:mod:`.heartbeats`). A rank makes progress when it ends a step, starts a collective, opens a group,
or computes (on the CPU). Without any for ``device.timeout_seconds`` it looks who it waits for. Two
threads, of which one does nothing but watch: the store may not answer either.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from mone_megatron.helpers import HelperError, HelperThread, one_line
from mone_megatron.methods.hook import Hook, Record
from mone_megatron.train.health.heartbeats import (
    Culprit,
    Heartbeat,
    find_culprits,
    joined_collectives,
    place_of,
    program_place,
)
from mone_megatron.train.health.signals import HANG_EXIT_CODE
from mone_megatron.train.run_directory import now
from mone_megatron.whole_files import write_json

# How much longer the process groups wait: the watchdog, which names the rank, is to be first.
BACKSTOP_SECONDS = 60
_INTERVAL_SECONDS = 1.0
# How long the store may take to tell who is at fault.
_ANSWER_SECONDS = 10.0
# How long the others are looked at after a collective failed: which of them still runs?
_LOOK_SECONDS = 5.0
# How long a rank may take to end by itself once another has said that the run is over.
_END_SECONDS = 30.0
# Of a core: less is waiting, which takes none, or polling.
_COMPUTING = 0.01
_NOTICE, _ELECTED = "notice", "elected"


@dataclass(frozen=True)
class Notice:
    """Holds what the rank that found the fault tells the others."""

    by: int
    culprits: list[int]
    text: str
    hang: bool


class _Peers:
    """Reaches the heartbeats in the run's store, through a connection of its own."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        # The main thread may wait in the store for minutes, and a connection serves one at a time.
        own = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store = distributed_c10d.PrefixStore("watchdog", own)

    def tell(self, beat: Heartbeat) -> None:
        self._store.set(str(self.rank), beat.to_json())

    def read(self) -> dict[int, Heartbeat]:
        names = [str(rank) for rank in range(self.size)]
        if not self._store.check(names):
            names = [name for name in names if self._store.check([name])]
        beats = map(Heartbeat.from_json, self._store.multi_get(names))
        return {beat.rank: beat for beat in beats}

    def elect(self) -> bool:
        """Returns whether this rank speaks for all: the first that asks does."""
        mine = str(self.rank)
        return bool(self._store.compare_set(_ELECTED, "", mine) == mine.encode())

    def announce(self, notice: Notice) -> None:
        self._store.set(_NOTICE, json.dumps(notice.__dict__))

    def notice(self) -> Notice | None:
        if not self._store.check([_NOTICE]):
            return None
        return Notice(**json.loads(self._store.get(_NOTICE)))


class Watchdog:
    """Watches the thread that enters it, from there on to its end."""

    def __init__(
        self,
        folder: Path,
        timeout_seconds: float,
        *,
        computes_on_cpu: bool,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """Watches a run whose process group is open.

        Args:
            folder: of the run; stacks go into ``hangs`` in it.
            timeout_seconds: how long there may be no progress.
            computes_on_cpu: whether a thread that uses a core is at work. Waiting for a GPU
                does, too.
            on_failure: is told why a thread of the watchdog ended before its time; None prints it.
        """
        self._on_failure = on_failure
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self.computes_on_cpu = computes_on_cpu
        self.interval = min(_INTERVAL_SECONDS, timeout_seconds / 8)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._phase, self._beats, self._alive = "starting", 0, 0
        self._ended: str | None = None
        self._bereft = self._failed = False
        self._stalled = 0.0
        # What ended the connection to the store, which has no other.
        self._store_ended: str | None = None
        self._hanging = threading.Event()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._before: tuple[float, dict[int, Heartbeat]] | None = None

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self._main_clock = time.pthread_getcpuclockid(self._main)
        self._peers = _Peers(self.rank, self.size) if self.size > 1 else None
        self._threads = [self._thread(self._watch, "watchdog")]
        if self._peers is not None:
            self._threads.append(self._thread(self._talk, "heartbeat"))
        for thread in self._threads:
            thread.start()
        return self

    def _thread(self, target: Callable[[], None], name: str) -> HelperThread:
        return HelperThread(target, name=name, on_failure=self._on_failure)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Says which rank is lost after a collective failed because of it, and ends here."""
        if self._hanging.is_set():
            # It waits for the others, to end this process. Theirs may have made this one fail.
            self._threads[0].join()
        self._bereft = error is not None and any(map(_in_a_collective, _chain(error)))
        self._ended = "it came to its end" if error is None else one_line(error)[:200]
        self._failed = error is not None
        self._wake.set()
        if error is not None and self._bereft and self.size > 1:
            self._lost(error)
        self._stop.set()
        for thread in self._threads:
            # The store may not answer any more: the thread is left to itself.
            thread.join(2 * self.interval)

    def beat(self, phase: str) -> None:
        """Takes note of progress: ``phase`` is what the run has done."""
        self._phase = phase
        self._beats += 1

    def _watch(self) -> None:
        last, seen, used = time.monotonic(), self._signature(), self._cpu_seconds()
        while not self._stop.wait(self.interval):
            now, signature, cpu = time.monotonic(), self._signature(), self._cpu_seconds()
            passed = now - last
            computed = self.computes_on_cpu and cpu - used > _COMPUTING * passed
            if signature != seen or computed:
                self._stalled = 0.0
            else:
                # A process that was stopped has not waited all that time.
                self._stalled += min(passed, 2 * self.interval)
            last, seen, used = now, signature, cpu
            if self._stalled >= self.timeout_seconds and self._ended is None:
                self._hang()

    def _signature(self) -> tuple[int, dict[str, int]]:
        return self._beats, joined_collectives()

    def _cpu_seconds(self) -> float:
        return time.clock_gettime(self._main_clock)

    def _heartbeat(self) -> Heartbeat:
        frame = sys._current_frames().get(self._main)
        place = place_of(frame)
        return Heartbeat(
            rank=self.rank,
            host=self._host,
            pid=self._pid,
            alive=self._alive,
            phase=self._phase,
            beats=self._beats,
            line=place.line,
            call=place.call,
            stack=program_place(frame),
            joined=joined_collectives(),
            ended=self._ended,
            bereft=self._bereft,
        )

    def _talk(self) -> None:
        """Tells the others how this rank is, and hears whether the run is over."""
        assert self._peers is not None
        try:
            while not self._stop.is_set():
                self._alive += 1
                self._peers.tell(self._heartbeat())
                if self._stalled < self.timeout_seconds / 2:
                    self._before = None
                elif self._before is None:
                    self._before = time.monotonic(), self._peers.read()
                if (notice := self._peers.notice()) is not None:
                    self._obey(notice)
                self._wake.wait(self.interval)
                self._wake.clear()
            if self._failed:
                self._peers.tell(self._heartbeat())
        except RuntimeError as error:
            # The store has ended, with rank 0 or its launcher: at the end of a run, or too early,
            # which the next collective finds out.
            self._store_ended = one_line(error)[:200]

    def _obey(self, notice: Notice) -> None:
        """Leaves, too, when another rank has found that the run is over."""
        if notice.by == self.rank:
            return
        if not notice.hang and self._stop.wait(_END_SECONDS):
            return
        with self._leaving():
            where = self._keep_stacks(notice.text)
            if self.rank in notice.culprits:
                self._say_own_stack(f"rank {self.rank} ends at the word of rank {notice.by}", where)
            self._mark(notice.text)

    def _hang(self) -> None:
        self._hanging.set()
        with self._leaving():
            beat = self._heartbeat()
            waited = f"{beat}, without progress for {self._stalled:.0f} s; it is {beat.doing}"
            where = self._keep_stacks(waited)
            self._conclude(waited, where, hang=True)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Ends the process after what is inside, and also when that fails: nobody else would."""
        try:
            yield
        except BaseException as error:
            print(f"error: the watchdog failed: {one_line(error)}", file=sys.stderr, flush=True)
        finally:
            self._leave()

    def _lost(self, error: BaseException) -> None:
        """Ends here when a collective failed and another rank is to blame."""
        told = f"{self._heartbeat()} {self._phase}: {one_line(error)[:200]}"
        where = self._keep("".join(traceback.format_exception(error)))
        if self._conclude(told, where, hang=False):
            self._leave()

    def _conclude(self, told: str, where: str, *, hang: bool) -> bool:
        """Finds and names the culprits; False when there are none."""
        if self._peers is None:
            self._say(told, [], where, hang=hang)
            return True
        answer: list[bool] = []
        peers = self._peers
        problems: list[str] = []
        inquiry = HelperThread(
            lambda: answer.append(self._inquire(peers, told, where, hang=hang)),
            name="inquiry",
            on_failure=problems.append,
        )
        try:
            inquiry.start()
            inquiry.join(_ANSWER_SECONDS + _LOOK_SECONDS)
        except HelperError as error:
            problems.append(str(error))
        if answer:
            return answer[0]
        if problems:
            self._say(f"{told}; who is at fault is not known: {problems[0]}", [], where, hang=hang)
            return True
        why = "rank 0 does not answer: it, or its launcher, holds the run's store"
        self._say(told, [Culprit(0, why)], where, hang=hang)
        return True

    def _inquire(self, peers: _Peers, told: str, where: str, *, hang: bool) -> bool:
        try:
            if self._store_ended is not None:
                raise RuntimeError(self._store_ended)
            if self._before is None:
                self._before = time.monotonic(), peers.read()
            since, before = self._before
            time.sleep(max(0.0, since + _LOOK_SECONDS - time.monotonic()))
            after = peers.read()
            culprits = find_culprits(
                before,
                after,
                size=self.size,
                asking=self.rank,
                seconds=time.monotonic() - since,
            )
            if not culprits and not hang:
                return False
            if peers.elect():
                notice = self._say(told, culprits, where, hang=hang)
                peers.announce(notice)
            # The others hear it from the store, which may end with this process.
            time.sleep(3 * self.interval)
            return True
        except RuntimeError as error:
            why = f"rank 0 has left or is lost: it, or its launcher, held the run's store ({error})"
            self._say(told, [Culprit(0, " ".join(why.split()))], where, hang=hang)
            return True

    def _say(self, told: str, culprits: list[Culprit], where: str, *, hang: bool) -> Notice:
        if culprits:
            due = "; ".join(culprit.why for culprit in culprits)
        elif self.size > 1:
            due = "no rank is behind the others"
        else:
            due = "there is no other rank"
        kind = "hang" if hang else "rank lost"
        text = f"{kind}: {due}. Found by {told}"
        line = f"error: {text}; stacks are in {where}; exit code {HANG_EXIT_CODE}"
        if hang:
            self._say_own_stack(line, where)
        else:
            print(line, file=sys.stderr, flush=True)
        self._mark(text)
        return Notice(self.rank, [culprit.rank for culprit in culprits], text, hang)

    def _say_own_stack(self, line: str, where: str) -> None:
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame))
        print(f"{line}\nrank {self.rank} is at\n{stack}", file=sys.stderr, end="", flush=True)

    def _keep_stacks(self, why: str) -> str:
        """Writes all threads' stacks into this rank's file."""
        where = self._keep(f"{why}\n")
        with suppress(OSError), Path(where).open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return where

    def _keep(self, text: str) -> str:
        """Adds to this rank's file; on a disk that takes no more, stderr has to do."""
        path = self.folder / "hangs" / f"rank_{self.rank:05d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{now()} {text}")
        except OSError as error:
            print(f"WARNING: {path}: {error}", file=sys.stderr, flush=True)
        return str(path)

    def _leave(self) -> NoReturn:
        """Ends now: nothing that waits for another rank is waited for."""
        try:
            if self.rank == 0:
                # It may hold the store that the others are still asking.
                time.sleep(3 * self.interval)
            for child in multiprocessing.active_children():
                child.kill()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(HANG_EXIT_CODE)

    def _mark(self, why: str) -> None:
        """Writes the end into run.json of a run that cannot do so itself any more."""
        path = self.folder / "run.json"
        if path.exists():
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["status"] == "running":
                write_json(path, facts | {"status": "failed", "why": why})


class WatchdogHook(Hook):
    """Tells the watchdog of every step."""

    def __init__(self, watchdog: Watchdog) -> None:
        """Tells ``watchdog``."""
        self.watchdog = watchdog

    def on_start(self) -> None:
        """Takes note that the first step begins, or what is measured before it."""
        self.watchdog.beat("in the first step")

    def on_start_record(self, record: Record) -> None:
        """Takes note that what comes before the first step is done."""
        self.watchdog.beat("in the first step")

    def on_step(self, record: Record) -> None:
        """Takes note of one more step."""
        self.watchdog.beat(f"after step {int(record['step'])}")

    def on_rollback(self, step: int) -> None:
        """Takes note of the way back to an earlier step."""
        self.watchdog.beat(f"after rolling back to step {step}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those it came from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _in_a_collective(error: BaseException) -> bool:
    """Returns whether a collective raised it: gloo gives plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and place_of(trace.tb_frame, trace.tb_lineno).call is not None
