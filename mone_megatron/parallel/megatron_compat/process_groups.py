"""Lets megatron-core make its process groups, and none twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

# What the groups of megatron-core are for; those of one purpose that have the same ranks are one
# group. Two of different purposes are not: they may be sending at the same time, and what one group
# sends is sent in turn. A group with a description that is not here is shared with none.
_GRADIENTS, _LAYERS, _EXPERTS, _LOSSES, _ENDS = "gradients", "layers", "experts", "losses", "ends"
GROUP_PURPOSES = {
    # Gradients are reduced and parameters gathered beside the layers' computation.
    "DATA_PARALLEL_GROUP_WITH_CP": _GRADIENTS,
    "DATA_PARALLEL_GROUP": _GRADIENTS,
    "EXPERT_DATA_PARALLEL_GROUP": _GRADIENTS,
    # 0.19 has the same once more for weights that are gathered from several ranks; ours are whole.
    "DATA_PARALLEL_GROUP_WITH_CP_WITH_GTP_REMAT": _GRADIENTS,
    "DATA_PARALLEL_GROUP_WITH_GTP_REMAT": _GRADIENTS,
    "EXPERT_DATA_PARALLEL_GROUP_WITH_GTP_REMAT": _GRADIENTS,
    # In the course of a layer.
    "TENSOR_MODEL_PARALLEL_GROUP": _LAYERS,
    "CONTEXT_PARALLEL_GROUP": _LAYERS,
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": _LAYERS,
    # A shared expert may compute, and send, beside the routed ones.
    "EXPERT_MODEL_PARALLEL_GROUP": _EXPERTS,
    "EXPERT_TENSOR_PARALLEL_GROUP": _EXPERTS,
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": _EXPERTS,
    # Counts of routers, between layers.
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": _LOSSES,
    "TENSOR_AND_DATA_PARALLEL_GROUP": _LOSSES,
    # When all else is done: gradients of tied embeddings, norms of gradients.
    "MODEL_PARALLEL_GROUP": _ENDS,
    "EMBEDDING_GROUP": _ENDS,
    "POSITION_EMBEDDING_GROUP": _ENDS,
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": _ENDS,
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": _ENDS,
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": _ENDS,
}


class SharedGroups:
    """Makes process groups, and gives one that there is where another would be its equal.

    megatron-core makes a group for each kind of parallelism and every set of ranks, most of which
    are of one rank, or have the ranks of another: 549 on 64 GPUs with expert parallelism 8. All
    ranks have to ask for the same groups in the same order.
    """

    def __init__(self, make: Callable[..., Any], *, connected: bool) -> None:
        """Prepares to make groups.

        Args:
            make: megatron-core's own function, which makes a group that there is not.
            connected: whether a group is split off the default one when it is made, which all
                ranks of that take part in.
        """
        self._make = make
        self._connected = connected
        self._made: dict[tuple[int, ...], dict[str, Any]] = {}

    def create(
        self, ranks: list[int], *, group_desc: str | None = None, **options: Any
    ) -> dist.ProcessGroup | None:
        """Returns a group of these ranks; nothing of use on ranks that are not in it.

        Args:
            ranks: of the default group.
            group_desc: what it is for: of :data:`GROUP_PURPOSES`, or a purpose of its own.
            options: as of ``torch.distributed.new_group``. A group with a backend or settings of
                its own is never shared.
        """
        mine = dist.get_rank() in ranks
        name = group_desc or ""
        purpose = GROUP_PURPOSES.get(name, name)
        if options.get("backend") is not None or options.get("pg_options") is not None:
            return self._make(ranks, group_desc=group_desc, **options)
        made = self._made.setdefault(tuple(sorted(ranks)), {})
        if len(ranks) == 1:
            purpose = ""  # nothing is sent in it
        elif purpose == _ENDS and purpose not in made:
            purpose = next((one for one in made if one in GROUP_PURPOSES.values()), purpose)
        if purpose not in made:
            # Nobody else has to know of a group of one rank.
            alone = len(ranks) == 1 and not self._connected
            if mine or not alone:
                options["use_local_synchronization"] = alone
                made[purpose] = self._make(ranks, group_desc=group_desc, **options)
            else:
                made[purpose] = None
        group: dist.ProcessGroup | None = made[purpose] if mine else None
        return group


@contextlib.contextmanager
def sharing_groups(*, connected: bool) -> Iterator[None]:
    """Lets megatron-core make its process groups by :class:`SharedGroups`; see there."""
    from megatron.core import parallel_state

    create = parallel_state.create_group
    parallel_state.create_group = SharedGroups(create, connected=connected).create
    try:
        yield
    finally:
        parallel_state.create_group = create
