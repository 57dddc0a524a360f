"""A closed terminal: no request of a run by itself, one under a launcher, nothing with nohup."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from mone_megatron.train.health.signals import StopRequest


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("launched", "nohup", "asked"),
    [(False, False, [0, 0]), (False, True, [0, 0]), (True, False, [1, 0]), (True, True, [0, 0])],
)
def test_hang_up(launched: bool, nohup: bool, asked: list[int]) -> None:
    before = signal.SIG_IGN if nohup else signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)
    with StopRequest(launched=launched) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.read(torch.device("cpu")).tolist() == asked
        assert stop.reason == ("SIGHUP" if asked[0] else None)
    assert signal.getsignal(signal.SIGHUP) == before
