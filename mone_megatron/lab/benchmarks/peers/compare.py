"""Compares contenders in one run: they take turns, and each keeps its process.

A turn is a step of each, in the order A B B A; ratios are of neighbouring turns. Growth is measured
in the same way at each size, so that a machine whose speed drifts does not show in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from mone_megatron.config.schema import Config
from mone_megatron.lab.benchmarks.measure import Samples, Spread, ratio
from mone_megatron.lab.benchmarks.peers.contender import Contender, Turn
from mone_megatron.lab.benchmarks.peers.start import FirstStep, start_trainer
from mone_megatron.lab.benchmarks.peers.task import (
    IMPLEMENTATIONS,
    MOE,
    MONE,
    PEER,
    PRODUCTS,
    PeerTask,
)

_KINDS = {MOE: "ours", MONE: "ours", PEER: "transformers", PRODUCTS: "products"}
# Measured ratios: numerator and denominator.
RATIOS = ((MOE, PEER), (MONE, PEER), (MONE, MOE), (MOE, PRODUCTS), (MONE, PRODUCTS),
          (PEER, PRODUCTS))  # fmt: skip
_WARM_STEPS = 2


@dataclass(frozen=True)
class Ratio:
    """Holds the step time of one contender over another's."""

    above: str
    below: str
    clock: Spread
    processor: Spread


@dataclass(frozen=True)
class Cell:
    """Holds what one size of the model gave.

    Attributes:
        size: what differs from the first size, such as ``experts 16``; "" for that one.
        parameters: of each contender's model.
        seconds: a step of each, by the clock.
        processor_seconds: the same in processor time.
        ratios: of :data:`RATIOS`.
        losses: of each contender's last step; transformers' holds the balance of experts, too.
        experts: what computes the experts of transformers' model here.
    """

    size: str
    parameters: dict[str, int]
    seconds: dict[str, Spread]
    processor_seconds: dict[str, Spread]
    ratios: list[Ratio]
    losses: dict[str, float]
    experts: str

    def ratio(self, above: str, below: str) -> Ratio:
        """Returns one of the ratios."""
        return next(one for one in self.ratios if (one.above, one.below) == (above, below))


@dataclass(frozen=True)
class PeersResult:
    """Holds a comparison.

    Attributes:
        hardware: in one line.
        tokens_per_step: at the first size.
        cells: the first size, then those that it grew to.
        implementations: the seconds of a step of each way of transformers to compute experts, or
            why it was left out, at the first size.
        peak_megabytes: of each contender's process, at the first size.
        growth: by size and contender of ours, how many times its step became as long as at the
            first size, over what transformers' did; in processor time.
        starts: from the start of a process to the end of its first step, in seconds.
        start_processor: the same in processor time.
    """

    hardware: str
    tokens_per_step: int
    cells: list[Cell]
    implementations: dict[str, float | str]
    peak_megabytes: dict[str, float]
    growth: dict[str, dict[str, float]]
    starts: dict[str, Spread]
    start_processor: dict[str, Spread]


@dataclass(frozen=True)
class Size:
    """Names a size, and gives its configurations."""

    name: str
    moe: Config
    mone: Config
    repeats: int


def measure_peers(
    sizes: Sequence[Size],
    *,
    vocab_size: int,
    hardware: str,
    start_overrides: Mapping[str, Sequence[str]],
    start_repeats: int,
    say: Callable[[str], None],
) -> PeersResult:
    """Measures all sizes, then the starts.

    Args:
        sizes: the first is what the others are compared with.
        vocab_size: the tokenizer's, unpadded.
        hardware: in one line.
        start_overrides: the configurations whose trainer is started, by contender.
        start_repeats: starts of each; 0 for none.
        say: is told how far it is.

    Raises:
        ValueError: for a model that transformers or the products do not know.
        HelperError: a contender failed.
    """
    first = sizes[0]
    train = first.moe.train
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(Contender(kind)) for name, kind in _KINDS.items()}
        # Tries the ways of transformers, so that the peak of the one that is measured is its own.
        scout = stack.enter_context(Contender(_KINDS[PEER]))
        cells: list[Cell] = []
        implementations: dict[str, float | str] = {}
        peaks: dict[str, float] = {}
        for size in sizes:
            say(f"peers: {size.name or 'the first size'}, {size.repeats} turns")
            cell, tried = _measure(size, contenders, scout, vocab_size)
            cells.append(cell)
            if size is first:
                implementations = tried
                peaks = {name: one.peak_megabytes() for name, one in contenders.items()}
        task = PeerTask(first.moe, vocab_size, contenders[MOE].batches(), cells[0].experts)
    starts = _measure_starts(task, start_overrides, start_repeats, say)
    return PeersResult(
        hardware=hardware,
        tokens_per_step=train.global_batch_size * train.seq_length,
        cells=cells,
        implementations=implementations,
        peak_megabytes=peaks,
        growth={cell.size: _growth(cells[0], cell) for cell in cells[1:]},
        starts={name: Spread.of([one.clock for one in seen]) for name, seen in starts.items()},
        start_processor={
            name: Spread.of([one.processor for one in seen]) for name, seen in starts.items()
        },
    )


def _growth(first: Cell, cell: Cell) -> dict[str, float]:
    return {
        name: cell.ratio(name, PEER).processor.median / first.ratio(name, PEER).processor.median
        for name in (MOE, MONE)
    }


def _measure(
    size: Size, contenders: Mapping[str, Contender], scout: Contender, vocab_size: int
) -> tuple[Cell, dict[str, float | str]]:
    parameters = {
        name: contenders[name].open(PeerTask(config, vocab_size))
        for name, config in ((MOE, size.moe), (MONE, size.mone))
    }
    task = PeerTask(size.moe, vocab_size, contenders[MOE].batches())
    tried = _try_implementations(scout, task)
    fastest = min(
        (name for name, seconds in tried.items() if isinstance(seconds, float)),
        key=lambda name: tried[name],
    )
    task = replace(task, experts=fastest)
    for name in (PEER, PRODUCTS):
        parameters[name] = contenders[name].open(task)
    turns = _take_turns(contenders, size.repeats)
    samples = Samples(
        {name: [turn.clock for turn in taken] for name, taken in turns.items()},
        {name: [turn.processor for turn in taken] for name, taken in turns.items()},
    )
    cell = Cell(
        size=size.name,
        parameters=parameters,
        seconds={name: Spread.of(series) for name, series in samples.clock.items()},
        processor_seconds={name: Spread.of(series) for name, series in samples.processor.items()},
        ratios=[
            Ratio(
                above, below, ratio(samples.clock, above, below),
                ratio(samples.processor, above, below),
            )
            for above, below in RATIOS
        ],
        losses={name: taken[-1].loss for name, taken in turns.items() if name != PRODUCTS},
        experts=fastest,
    )  # fmt: skip
    return cell, tried


def _try_implementations(scout: Contender, task: PeerTask) -> dict[str, float | str]:
    """Returns the processor seconds of a step in each way, or why it was left out.

    One of them trains the first microbatch alone.
    """
    tried: dict[str, float | str] = {}
    short = replace(task, steps=tuple(step[:1] for step in task.steps[:1]))
    for name in IMPLEMENTATIONS:
        try:
            scout.open(replace(short, experts=name))
        except ValueError as error:
            tried[name] = str(error)
            continue
        scout.run(1)
        tried[name] = scout.run(1).processor
    return tried


def _take_turns(contenders: Mapping[str, Contender], repeats: int) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run(_WARM_STEPS)
    for number in range(repeats):
        for name in _order(list(contenders), number):
            turns[name].append(contenders[name].run(1))
    return turns


def _order(names: list[str], number: int) -> Iterator[str]:
    return iter(names) if number % 2 == 0 else reversed(names)


def _measure_starts(
    task: PeerTask,
    overrides: Mapping[str, Sequence[str]],
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, list[FirstStep]]:
    starts: dict[str, list[FirstStep]] = {name: [] for name in (*overrides, PEER)}
    if not repeats:
        return {}
    say(f"peers: {repeats} starts of each")
    for _ in range(repeats):
        for name, given in overrides.items():
            starts[name].append(start_trainer(given))
        starts[PEER].append(_start_transformers(task))
    return starts


def _start_transformers(task: PeerTask) -> FirstStep:
    with Contender(_KINDS[PEER]) as contender:
        contender.open(task)
        contender.run(1)
        clock = time.perf_counter() - contender.started
        return FirstStep(clock, contender.processor_seconds())
