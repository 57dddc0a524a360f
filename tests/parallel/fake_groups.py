"""The process groups of a large run, made by ranks of a world that is not there, as JSON.

python tests/parallel/fake_groups.py WORLD RANKS key=size ...    (RANKS: 0,1,7)
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend


def made_by(rank: int, world: int, sizes: dict[str, int], *, shared: bool, bound: bool) -> Any:
    """What one rank asks torch for, and the ranks of every group that megatron-core then has."""
    from megatron.core import parallel_state

    from mone_megatron.config.schema import ParallelConfig, TrainConfig
    from mone_megatron.parallel import groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    asked: list[list[int]] = []
    mine = set()
    new_group = dist.new_group

    def counted(ranks: list[int], **options: Any) -> Any:
        asked.append(sorted(ranks))
        group = new_group(ranks, **options)
        if rank in ranks:
            mine.add(id(group))
            kept.append(group)
        return group

    kept: list[Any] = []
    alone = patch.object(groups, "sharing_groups", lambda **options: nullcontext())
    bound_or_not = patch.object(groups, "connects_when_made", lambda: bound)
    sharing = nullcontext() if shared else alone
    with patch.object(dist, "new_group", counted), bound_or_not, sharing:
        groups.open_groups(ParallelConfig(**sizes), TrainConfig(), timeout_seconds=300)
    named = {
        name: group
        for name, group in sorted(vars(parallel_state).items())
        if name.endswith(("GROUP", "GROUP_WITH_CP")) and isinstance(group, dist.ProcessGroup)
    }
    found = {name: dist.get_process_group_ranks(group) for name, group in named.items()}
    numbers = {name: kept.index(group) for name, group in named.items()}
    groups.close_groups()
    return {"asked": asked, "in": len(mine), "groups": found, "numbers": numbers}


def main() -> None:
    """Prints what each rank makes: with shared groups, that of megatron-core alone, and bound."""
    warnings.simplefilter("ignore")
    install_cpu_backend()
    world, ranks = int(sys.argv[1]), [int(rank) for rank in sys.argv[2].split(",")]
    sizes = {key: int(size) for key, size in (one.split("=") for one in sys.argv[3:])}
    print(
        json.dumps(
            {
                name: [made_by(rank, world, sizes, shared=shared, bound=bound) for rank in ranks]
                for name, shared, bound in (
                    ("shared", True, False),
                    ("plain", False, False),
                    ("connected", True, True),
                )
            }
        )
    )


if __name__ == "__main__":
    main()
