"""Gives TCP ports to processes that tests start, each to one of them only.

A port is chosen here and bound later, by a process that has to start first. Of ports chosen at
random two tests that run beside each other choose the same one once in some hundred runs of the
suite, and one of them then fails. So the ports go round: one file of the machine's user says which
is next, and a port comes again only after all others have been given.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_FEWEST = 4000
_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def ports_to_give(outgoing: range) -> range:
    """Returns the ports that are given: some thousands beside those of outgoing connections.

    Args:
        outgoing: what the system gives to sockets that name no port, gloo's among them. Where they
            leave too few others, they are among those returned.
    """
    below = range(max(10000, outgoing.start - 12000), outgoing.start)
    above = range(outgoing.stop, 65536)
    largest = max(below, above, key=len)
    return largest if len(largest) >= _FEWEST else range(20000, 32000)


def _outgoing() -> range:
    """Returns the ports of outgoing connections, Linux's usual ones where the system does not
    say.
    """
    try:
        first, last = map(int, _LOCAL_RANGE.read_text(encoding="ascii").split())
    except OSError:
        return range(32768, 61000)
    return range(first, last + 1)


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        try:
            candidate.bind(("", port))
        except OSError:
            return False
    return True


def free_ports(count: int, turn: Path | None = None) -> list[int]:
    """Returns distinct TCP ports that are free and that no other test is given soon.

    Args:
        count: how many.
        turn: the file that says which port is next; by default one for all processes of the
            machine's user.

    Raises:
        RuntimeError: when the machine has too few.
    """
    ports = ports_to_give(_outgoing())
    turn = turn or Path(tempfile.gettempdir()) / f"mone_megatron_ports-{os.getuid()}"
    given: list[int] = []
    with turn.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        said = file.read()
        start = int(said) if said.isdecimal() else random.SystemRandom().randrange(len(ports))
        for tried in range(start, start + len(ports)):
            if len(given) == count:
                break
            port = ports[tried % len(ports)]
            if _is_free(port):
                given.append(port)
        else:
            tried = start
        file.truncate(0)
        file.write(str(tried % len(ports)))
    if len(given) < count:
        raise RuntimeError(f"only {len(given)} free ports of {count} in {ports}")
    return given
