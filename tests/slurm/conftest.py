"""A SLURM of this session's own; installed when it is not there and can be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, install, open_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One controller, two nodes."""
    if reason := install():
        pytest.skip(reason)
    with open_cluster() as opened:
        yield opened
