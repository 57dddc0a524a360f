"""What a checkpoint holds of the model and the optimizer, in a form that no layout shows in.

Every tensor is saved under the global name of a parameter, in the parameter's own shape:

    <name>                       the weight, in the model's dtype
    optimizer.master.<name>      its fp32 master, when the model is not fp32
    optimizer.exp_avg.<name>     the optimizer's moments; these are Adam's
    optimizer.exp_avg_sq.<name>

megatron-core's own optimizer checkpoints carry the layout in their keys (one or two optimizers with
expert parallelism off or on) and differ with the distributed optimizer; these do not, so any
tensor, pipeline, expert, expert tensor and data parallel layout loads any other's, with the
distributed optimizer on or off.

With the distributed optimizer each data-parallel rank holds a slice of a parameter's state. For
saving the slices are put together one parameter at a time, and data-parallel rank ``i % ranks``
keeps the i-th, on the host: no rank holds everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
)
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from mone_megatron.methods.optimizer import Optimizer

MASTER = "master"


@dataclass(frozen=True)
class ParameterState:
    """Holds the optimizer's state of one parameter on this rank.

    Attributes:
        parameter: the model's.
        main: the tensor the optimizer updates: the parameter, its fp32 master, or this rank's
            slice of either; None when this rank holds none of it.
        inner: the torch optimizer that holds the moments of ``main``.
        span: which elements of the flattened parameter ``main`` is.
        group: the data-parallel ranks that share the state (slices), or hold copies of it.
        sliced: whether ranks of the group hold slices.
        moments: the names of what the optimizer keeps for each parameter.
    """

    parameter: nn.Parameter
    main: Tensor | None
    inner: torch.optim.Optimizer | None
    span: tuple[int, int]
    group: dist.ProcessGroup
    sliced: bool
    moments: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Returns the names of the tensors that there are."""
        fp32 = self.parameter.dtype is torch.float32
        return self.moments if fp32 else (MASTER, *self.moments)

    def tensor(self, kind: str) -> Tensor | None:
        """Returns this rank's tensor of a kind; zeros before the first update."""
        if self.main is None or self.inner is None:
            return None
        if kind == MASTER:
            return self.main.detach()
        found = self.inner.state[self.main].get(kind)
        return found if found is not None else torch.zeros_like(self.main, dtype=torch.float32)

    def assign(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Takes over whole tensors from a checkpoint made after ``updates`` optimizer steps."""
        if self.main is None or self.inner is None:
            return
        first, last = self.span
        parts = {
            kind: tensor.reshape(-1)[first:last].view_as(self.main)
            for kind, tensor in tensors.items()
        }
        with torch.no_grad():
            if MASTER in parts:
                self.main.copy_(parts[MASTER])
        state = self.inner.state[self.main]
        for kind in self.moments:
            state[kind] = parts[kind].to(self.main.device, torch.float32).clone()
        # Where fused kernels look for it; the others would wait for the device to read it there.
        fused = any(group.get("fused") for group in self.inner.param_groups)
        where = self.main.device if fused else torch.device("cpu")
        state["step"] = torch.tensor(float(updates), device=where)


def _distributed(optimizer: DistributedOptimizer) -> Iterator[ParameterState]:
    for buffer in optimizer.buffers:
        for parameter in buffer.param_index_map:
            main, span = None, (0, 0)
            if parameter in optimizer.model_param_group_index_map:
                group, place = optimizer.model_param_group_index_map[parameter]
                main = optimizer.optimizer.param_groups[group]["params"][place]
                local = optimizer._get_model_param_range_map(parameter)["param"]
                span = (local.start, local.end)
            group = optimizer.data_parallel_group
            inner = optimizer.optimizer
            moments = moments_of(inner, parameter)
            yield ParameterState(parameter, main, inner, span, group, True, moments)


def _replica_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    # See GroupedExperts: `allreduce` is False where an expert's replicas are not the dense ones.
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _whole(parameter: nn.Parameter, main: Tensor, inner: torch.optim.Optimizer) -> ParameterState:
    span = (0, parameter.numel())
    group = _replica_group(parameter)
    return ParameterState(parameter, main, inner, span, group, False, moments_of(inner, parameter))


def keep_moments(inner: torch.optim.Optimizer, method: Optimizer) -> None:
    """Says which method an optimizer is: what it keeps for each parameter, and checkpoints hold."""
    inner.method = method  # type: ignore[attr-defined]


def moments_of(inner: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """Returns what an optimizer keeps for a parameter of the model (:func:`keep_moments`)."""
    method: Optimizer = inner.method  # type: ignore[attr-defined]
    return method.moments_of(parameter)


def inner_parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yields megatron-core's optimizers that have parameters on this rank, dense and experts'."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    # No parameters of a kind on this rank: no optimizer.
    yield from (part for part in parts if part.optimizer is not None)


def parameter_states(optimizer: MegatronOptimizer) -> Iterator[ParameterState]:
    """Yields every parameter's state, in the same order on all ranks of its group."""
    for part in inner_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            yield from _distributed(part)
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for models, mains in zip(
                part.float16_groups, part.fp32_from_float16_groups, strict=True
            ):
                for model, main in zip(models, mains, strict=True):
                    yield _whole(model, main, part.optimizer)
            for group in part.fp32_from_fp32_groups:
                for parameter in group:
                    yield _whole(parameter, parameter, part.optimizer)
        else:
            assert isinstance(part, FP32Optimizer), type(part)
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield _whole(parameter, parameter, part.optimizer)


def _put_together(state: ParameterState, kind: str, owner: int) -> Tensor:
    """Returns the whole tensor of a parameter from its slices. Collective over ``state.group``.

    Slices are added as integers: x + 0 is x for every bit pattern, also of -0.0. The result is
    whole on rank ``owner`` of the group, and of no use on the others.
    """
    part = state.tensor(kind)
    if not state.sliced:
        assert part is not None
        return part.reshape(state.parameter.shape)
    bits = torch.zeros(state.parameter.numel(), dtype=torch.int32, device=state.parameter.device)
    if part is not None:
        first, last = state.span
        bits[first:last] = part.detach().float().reshape(-1).view(torch.int32)
    dist.reduce(bits, dist.get_global_rank(state.group, owner), group=state.group)
    return bits.view(torch.float32).reshape(state.parameter.shape)


def model_state(chunks: list[DistributedDataParallel]) -> ShardedStateDict:
    """Returns the weights and buffers (expert bias) of this rank's chunks as sharded tensors.

    Collective over the data-parallel ranks.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            # Of what the others updated a rank has the values of the step before, until the next
            # forward pass gathers them.
            chunk.start_param_sync(force_sync=True)
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # Otherwise the layers of a dense model are stacked into one tensor.
        "non_homogeneous_layers": True,
    }
    return {
        f"chunk_{number}": {
            name: entry
            for name, entry in unwrap_model(chunk).sharded_state_dict(metadata=metadata).items()
            # Empty pickles of megatron-core's linear layers (Transformer Engine's fp8 scales).
            if not name.endswith("_extra_state")
        }
        for number, chunk in enumerate(chunks)
    }


def _by_parameter(
    model: ShardedStateDict,
) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    return {
        entry.data: entry
        for entry in nested_values(model)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _key(kind: str, name: str) -> str:
    return f"optimizer.{kind}.{name}"


def master_key(name: str) -> str:
    """Returns under which name the fp32 master of a weight is saved."""
    return _key(MASTER, name)


def _entry(
    like: ShardedTensor | ShardedTensorFactory, kind: str, tensor: Tensor, replica: int
) -> ShardedTensor | ShardedTensorFactory:
    """Returns a sharded tensor beside a weight's: same shape and place, another name."""
    changes: dict[str, object] = {
        "key": _key(kind, like.key),
        "data": tensor,
        "replica_id": (*like.replica_id[:-1], replica),
    }
    if isinstance(like, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(like, **changes)


def optimizer_state(optimizer: MegatronOptimizer, model: ShardedStateDict) -> ShardedStateDict:
    """Masters and moments for saving. Collective: every rank calls it at the same step."""
    weights = _by_parameter(model)
    entries: ShardedStateDict = {}
    for number, state in enumerate(parameter_states(optimizer)):
        owner = number % dist.get_world_size(state.group)
        for kind in state.kinds:
            tensor = _put_together(state, kind, owner)
            if owner == dist.get_rank(state.group):
                kept = tensor.detach().to("cpu", copy=True)
                entries[f"{number}.{kind}"] = _entry(weights[state.parameter], kind, kept, 0)
    return entries


def optimizer_targets(
    optimizer: MegatronOptimizer, model: ShardedStateDict
) -> tuple[ShardedStateDict, list[tuple[ParameterState, str, str]]]:
    """Returns empty tensors to load masters and moments into, and whose each one is."""
    weights = _by_parameter(model)
    entries: ShardedStateDict = {}
    owners: list[tuple[ParameterState, str, str]] = []
    for number, state in enumerate(parameter_states(optimizer)):
        if state.main is None:
            continue
        like = weights[state.parameter]
        for kind in state.kinds:
            name = f"{number}.{kind}"
            target = torch.empty(state.parameter.shape, dtype=torch.float32)
            entries[name] = _entry(like, kind, target, dist.get_rank(state.group))
            owners.append((state, kind, name))
    return entries, owners


def assign_optimizer_state(
    loaded: dict[str, Tensor], owners: list[tuple[ParameterState, str, str]], updates: int
) -> None:
    """Gives each parameter what was loaded for it."""
    by_state: dict[int, tuple[ParameterState, dict[str, Tensor]]] = {}
    for state, kind, name in owners:
        by_state.setdefault(id(state), (state, {}))[1][kind] = loaded[name]
    for state, tensors in by_state.values():
        state.assign(tensors, updates)
        if state.inner is not None:
            _count_in_groups(state.inner, updates)


def _count_in_groups(inner: torch.optim.Optimizer, updates: int) -> None:
    """Tells optimizers that count updates once for a group how many there were.

    Transformer Engine's and apex's Adam do. They make the count at their first update, so a new one
    has none yet, and would correct its bias as if there had been no update before. torch's count in
    each parameter's state.
    """
    if type(inner).__module__.startswith("torch.optim"):
        return
    for group in inner.param_groups:
        before = group.get("step")
        group["step"] = torch.full_like(before, updates) if torch.is_tensor(before) else updates
