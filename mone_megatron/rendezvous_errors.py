"""Says in one line why the processes of a run cannot meet at their port."""

from __future__ import annotations


def why_not_met(error: Exception, port: str = "") -> str:
    """Returns what is wrong and what helps.

    Args:
        error: torch's ``DistNetworkError``.
        port: its number, where the error does not say it.
    """
    said = " ".join(str(error).split())
    if "EADDRINUSE" in said:
        number = port or said.partition("port: ")[2].partition(",")[0]
        return (
            f"port {number}: another process has it; give torchrun a free one with --master-port "
            "(MASTER_PORT without torchrun)"
        )
    return (
        f"the processes of the run cannot meet ({said}); look at --master-addr and --master-port, "
        "which torchrun hands on as MASTER_ADDR and MASTER_PORT"
    )
