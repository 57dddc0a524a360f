"""A function in several processes: results in order, and no death that makes anyone wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import pytest

from mone_megatron.helpers import HelperError
from mone_megatron.worker_processes import WorkerProcesses

# Larger than what a pipe takes without a reader.
_MEGABYTE = 1 << 20


def processes(function: Callable[[int], bytes], count: int = 2) -> WorkerProcesses[int, bytes]:
    return WorkerProcesses(
        function, count, one="a worker", many=f"{count} workers", otherwise="use one"
    )


def large(number: int) -> bytes:
    # The later, the faster: results would come in another order.
    time.sleep(0.02 / (number + 1))
    return str(number).encode() * _MEGABYTE


def killed_at_five(number: int) -> bytes:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return large(number)


def refuses(number: int) -> bytes:
    raise ValueError(f"{number} is refused")


def fails(number: int) -> bytes:
    # A lambda in an exception cannot be pickled.
    raise KeyError(lambda: number)


def started() -> list[BaseProcess]:
    """Those that the test running now has started: other tests keep some of their own."""
    return [child for child in multiprocessing.active_children() if child.pid not in _EARLIER]


_EARLIER: set[int | None] = set()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    _EARLIER.clear()
    _EARLIER.update(child.pid for child in multiprocessing.active_children())
    yield
    assert started() == []


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_inputs(count: int) -> None:
    with processes(large, count) as workers:
        firsts = [result[:2] for result in workers.results(range(20))]
    assert firsts == [str(number).encode() * (1 if number > 9 else 2) for number in range(20)]


def test_no_input_starts_no_process() -> None:
    with processes(large) as workers:
        assert list(workers.results([])) == []
        assert started() == []


def test_a_process_that_dies_at_work() -> None:
    with processes(killed_at_five) as workers, pytest.raises(HelperError) as failed:
        list(workers.results(range(40)))
    assert "a worker was killed by SIGKILL" in str(failed.value)
    assert str(failed.value).endswith("; use one")


# While it starts, while inputs are handed over, while a result of a megabyte is on its way.
@pytest.mark.parametrize("after", [0, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_process_that_is_killed(at: int, after: float) -> None:
    def inputs() -> Iterator[int]:
        for number in range(60):
            if number == at:
                time.sleep(after)
                child = started()[0]
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
            yield number

    with processes(large) as workers, pytest.raises(HelperError, match="killed by SIGKILL"):
        list(workers.results(inputs()))


def test_what_the_function_raises() -> None:
    with processes(refuses) as workers, pytest.raises(ValueError, match=r"^0 is refused$"):
        list(workers.results(range(3)))
    with processes(fails) as workers, pytest.raises(HelperError) as failed:
        list(workers.results(range(3)))
    assert str(failed.value).startswith("a worker failed: KeyError: <function")
