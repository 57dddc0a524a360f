"""Begin a run with the weights of a checkpoint: ``checkpoint.initialize``.

Only weights, expert biases and the state of the selection rule are taken, each in the best
precision there is: the fp32 master if the checkpoint has one, else the weight. Everything else is a
new run's: step 0, no moments, the schedule and the data from their beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from mone_megatron.checkpoint import restricted_pickle
from mone_megatron.data.framing import Framing
from mone_megatron.methods.rule import STATE_PREFIX
from mone_megatron.train.resume.identity import check_same_model, other_framing
from mone_megatron.train.resume.reading import (
    Shapes,
    fill_chunk,
    find_at,
    load,
    stored_shapes,
    wanted_shapes,
)
from mone_megatron.train.resume.saved_state import (
    MASTER,
    master_key,
    model_state,
    parameter_states,
)
from mone_megatron.train.state import TrainingState

_NEEDED_FOR = "the model cannot begin with it: use another checkpoint with checkpoint.initialize"


def initialize(
    state: TrainingState,
    path: Path,
    *,
    identity: dict[str, Any],
    framing: Framing | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fills the weights, and the masters of a model that is not fp32. Collective over all ranks.

    The optimizer must be as it was built. While it loads, a rank holds its part of the weights once
    more, in fp32 on the host.

    Args:
        state: this rank's part of the model and the optimizer.
        path: a checkpoint of a run, of any layout, dtype and step, or one that holds weights only.
        identity: this run's, from :func:`~mone_megatron.train.resume.identity.run_identity`.
        framing: of this run's documents, which may be another than the weights have seen; None if
            it is not known.
        say: tells the user, once.

    Returns:
        The facts of the checkpoint.

    Raises:
        DamagedCheckpointError: naming each damaged file.
        UnsafePickleError: the checkpoint wants to run something.
        ValueError: naming each key of another model, or each weight that is missing.
    """
    folder, facts = find_at(path)
    check_same_model(facts.get("identity", {}), identity, folder)
    model = model_state(state.chunks)
    with restricted_pickle(folder):
        stored = stored_shapes(folder)
    new = {name for entries in model.values() for name in entries if _is_new(name, entries, stored)}
    targets: ShardedStateDict = {
        chunk: {name: _target(entry, stored) for name, entry in entries.items() if name not in new}
        for chunk, entries in model.items()
    }
    loaded = load(folder, {"model": targets}, needed_for=_NEEDED_FOR)["model"]
    for chunk, entries in model.items():
        loaded[chunk] |= {name: entry.data for name, entry in entries.items() if name in new}
    for number, chunk in enumerate(state.chunks):
        fill_chunk(chunk, loaded[f"chunk_{number}"])
    _fill_masters(state, model, loaded)
    say(f"begins with the weights of {folder}")
    if new:
        say("the state of mone.rule, which that checkpoint does not hold, begins anew")
    if warning := other_framing(facts, framing, folder):
        say(warning)
    return facts


def _is_new(name: str, entries: ShardedStateDict, stored: Shapes) -> bool:
    """Returns whether it is the state of a selection rule that the checkpoint does not have."""
    if not name.rpartition(".")[2].startswith(STATE_PREFIX):
        return False
    return not wanted_shapes({name: entries[name]}).keys() <= stored.keys()


def _target(
    like: ShardedTensor | ShardedTensorFactory, stored: Shapes
) -> ShardedTensor | ShardedTensorFactory:
    """Returns where to load a weight or buffer: in fp32, from its master if there is one."""
    master = replace(like, key=master_key(like.key))
    source = master if wanted_shapes({"master": master}).keys() <= stored.keys() else like
    changes: dict[str, object] = {"data": torch.empty(like.data.shape, dtype=torch.float32)}
    if isinstance(like, ShardedTensor):
        changes["dtype"] = torch.float32
    return replace(source, **changes)


@torch.no_grad()
def _fill_masters(
    state: TrainingState, model: ShardedStateDict, loaded: dict[str, dict[str, Tensor]]
) -> None:
    """Masters were copied from the weights when the optimizer was built: copy them anew."""
    exact = {
        entry.data: loaded[chunk][name]
        for chunk, entries in model.items()
        for name, entry in entries.items()
    }
    for one in parameter_states(state.optimizer):
        if MASTER in one.kinds and one.main is not None:
            first, last = one.span
            one.main.copy_(exact[one.parameter].reshape(-1)[first:last].view_as(one.main))
