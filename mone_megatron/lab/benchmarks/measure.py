"""Times actions interleaved: ratios then hold on a machine whose speed drifts or is shared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Measurements by name; the i-th of all names were taken one after the other.
Series = dict[str, list[float]]


@dataclass(frozen=True)
class Samples:
    """Holds the seconds of one call, on the clock and of processor time.

    Processor time is over the threads of this process. The clock is what counts; processor time
    holds still when other processes take the cores.
    """

    clock: Series
    processor: Series


@dataclass(frozen=True)
class Spread:
    """Holds the median and range of repeated measurements."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises ``values``, at least one."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.smallest:.3f}..{self.largest:.3f})"


def interleave(
    actions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int, calls: int = 1
) -> Samples:
    """Measures the seconds of one call of each action, in the order A B B A A B ...

    Args:
        actions: by name; each must return only when its work is done.
        repeats: measurements of each.
        warmup: unmeasured rounds before them.
        calls: calls in one measurement, for actions near the clock's resolution.

    Returns:
        ``repeats`` measurements of each name.

    Raises:
        ValueError: without repeats or calls.
    """
    if repeats < 1 or calls < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} and calls={calls} must be 1 or more, warmup 0 or more")
    samples = Samples({name: [] for name in actions}, {name: [] for name in actions})
    names = list(actions)
    for turn in range(warmup + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            action = actions[name]
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(calls):
                action()
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            if turn >= warmup:
                samples.clock[name].append(clock / calls)
                samples.processor[name].append(processor / calls)
    return samples


def ratio(series: Series, numerator: str, denominator: str) -> Spread:
    """Returns the time of one action over another's, from neighbouring measurements."""
    pairs = zip(series[numerator], series[denominator], strict=True)
    return Spread.of([above / below for above, below in pairs])


def difference(series: Series, longer: str, shorter: str) -> Spread:
    """Returns the seconds that one action takes beyond another, from neighbouring measurements."""
    pairs = zip(series[longer], series[shorter], strict=True)
    return Spread.of([more - less for more, less in pairs])


def finished(
    action: Callable[[], object], device: torch.device, *, calls: int = 20
) -> Callable[[], object]:
    """Returns an action for :func:`interleave` that returns when ``action``'s work is done.

    On a GPU that is ``calls`` calls and one wait, so that launching is not what is measured; on
    CPU one call.
    """
    if device.type != "cuda":
        return action

    def several() -> None:
        for _ in range(calls):
            action()
        torch.cuda.synchronize(device)

    return several


def graphed(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns the action captured as a CUDA graph on a GPU, so that no launch costs.

    On CPU it returns the action itself. Not run here: there was no GPU.
    """
    if device.type != "cuda":
        return action
    side = torch.cuda.Stream(device)
    # What the action reads may still be being made.
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay
