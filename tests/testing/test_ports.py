"""Processes that tests start have ports of their own."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path

import pytest

from mone_megatron.testing.ports import free_ports, ports_to_give


def _some(turn: Path) -> list[int]:
    return [port for _ in range(20) for port in free_ports(5, turn)]


def test_processes_at_work_together_get_different_ports(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        given = [port for ports in pool.map(_some, [tmp_path / "turn"] * 8) for port in ports]
    assert len(set(given)) == len(given) == 800


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_in_use_is_not_given(tmp_path: Path, address: str) -> None:
    turn = tmp_path / "turn"
    (port,) = free_ports(1, turn)
    place = int(turn.read_text()) - 1
    with socket.socket() as taken:
        taken.bind((address, port))
        turn.write_text(str(place))
        assert port not in free_ports(5, turn)
    turn.write_text(str(place))
    assert free_ports(1, turn) == [port]


@pytest.mark.parametrize("said", ["", "half a number", "-3", "999999999"])
def test_the_turn_goes_on_whatever_its_file_says(tmp_path: Path, said: str) -> None:
    turn = tmp_path / "turn"
    turn.write_text(said)
    first, second = free_ports(1, turn), free_ports(1, turn)
    assert first != second


def test_more_ports_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="free ports of 70000"):
        free_ports(70_000, tmp_path / "turn")


@pytest.mark.parametrize(
    ("outgoing", "expected"),
    [
        (range(32768, 61000), range(20768, 32768)),
        (range(16000, 65536), range(10000, 16000)),
        (range(10000, 40000), range(40000, 65536)),
        (range(1024, 65536), range(20000, 32000)),
    ],
)
def test_ports_are_beside_those_of_outgoing_connections(outgoing: range, expected: range) -> None:
    assert ports_to_give(outgoing) == expected
