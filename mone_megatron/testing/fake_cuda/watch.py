"""Watches every operation on its way to a FakeTensor, and says what a GPU would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mone_megatron.testing.fake_cuda.findings import WAIT, Findings

FAULT, COPY = "fault", "copy"
# Operations whose result, or whose shape, the host has to see.
_SEEN = ("aten::equal", "aten::is_nonzero", "aten::_unique2", "aten::unique_dim", "aten::bincount")
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Routing:
    """Holds the numbers that a mask would give: those of uniform routing."""

    def __init__(self, tokens: int, topk: int, experts: int, kept: int) -> None:
        self.tokens, self.topk, self.experts, self.kept = tokens, topk, experts, kept

    def true_in(self, mask: Tensor) -> int:
        """Returns how many elements of a mask are True."""
        shape = tuple(mask.shape)
        if self.experts and shape and self.experts in (shape[0], shape[-1]):
            return self.tokens * self.topk
        if len(shape) == 2:
            return shape[0] * self.kept
        return max(1, mask.numel() // 2)


def on_gpu(value: object) -> bool:
    """Returns whether a value is a tensor of the fake device."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class WatchOperations(TorchDispatchMode):
    """Sees what reaches the dispatcher, backward passes too, before FakeTensorMode does."""

    def __init__(self, findings: Findings, routing: Routing) -> None:
        super().__init__()
        self.findings, self.routing = findings, routing

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name, note = func._schema.name, self.findings.note
        if name.startswith("c10d::"):
            return self._collective(func, args, kwargs)
        if name == "aten::_local_scalar_dense":
            dtype = args[0].dtype
            if on_gpu(args[0]):
                note(WAIT, f"item of {_describe(args[0])}")
            return 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 1
        if name == "aten::record_stream":
            return None
        if name == "aten::_pin_memory":
            return args[0]
        if name == "aten::is_pinned":
            return True
        if name in ("aten::_to_copy", "aten::to"):
            target = kwargs.get("device")
            if target is not None:
                source, target = args[0].device.type, torch.device(target).type
                self._copied(source, target, args[0], kwargs.get("non_blocking", False))
        elif name == "aten::copy_" and isinstance(args[1], Tensor):
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            self._copied(args[1].device.type, args[0].device.type, args[0], non_blocking)
        elif name == "aten::nonzero":
            if on_gpu(args[0]):
                note(WAIT, f"nonzero of {_describe(args[0])}")
            count = self.routing.true_in(args[0])
            return torch.empty(count, args[0].dim(), dtype=torch.long, device=args[0].device)
        elif name == "aten::masked_select":
            if on_gpu(args[0]):
                note(WAIT, f"masked_select of {_describe(args[0])}")
            return args[0].new_empty(self.routing.true_in(args[1]))
        elif name in _INDEXED and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        ):
            # A single value under a mask is masked_fill, which nothing waits for.
            if on_gpu(args[0]) and (name == "aten::index" or args[2].numel() != 1):
                note(WAIT, f"indexing of {_describe(args[0])} by a mask")
            if name.endswith("_"):
                return args[0]
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            note(WAIT, f"repeat_interleave by {_describe(args[0])} without output_size")
        elif name in _SEEN and on_gpu(args[0]):
            note(WAIT, name.removeprefix("aten::"))
            if name in ("aten::equal", "aten::is_nonzero"):
                return True
        elif name == "aten::_grouped_mm":
            self._grouped_product(args[0], args[1])
        return func(*args, **kwargs)

    def _copied(self, source: str, target: str, tensor: Tensor, non_blocking: bool) -> None:
        if source != target:
            to = "device to host" if target == "cpu" else "host to device"
            self.findings.note(COPY if non_blocking else WAIT, f"{to}: {_describe(tensor)}")

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch._C._distributed_c10d import FakeWork

        name = func._schema.name
        for value in _leaves([*args, *kwargs.values()]):
            if not isinstance(value, Tensor):
                continue
            if not on_gpu(value):
                self.findings.note(FAULT, f"NCCL is given a CPU tensor: {name} {_describe(value)}")
            elif not value.is_contiguous():
                self.findings.note(FAULT, f"NCCL is given strides: {name} {_describe(value)}")
        self.findings.collective(name)
        if name == "c10d::alltoall_base_":
            for tensor, sizes in ((args[0], args[3]), (args[1], args[4])):
                assert not sizes or sum(sizes) == tensor.shape[0], (tensor.shape, sizes)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _grouped_product(self, left: Tensor, right: Tensor) -> None:
        for label, operand in (("left", left), ("right", right)):
            strides = operand.stride()
            wide = [stride for stride in strides if stride != 1]
            reason = None
            if operand.dtype is not torch.bfloat16:
                reason = str(operand.dtype)
            elif operand.numel() == 0:
                reason = "is empty"
            elif 1 not in strides or any(s * operand.element_size() % 16 for s in wide):
                reason = f"has strides {strides}"
            if reason is not None:
                what = f"grouped_mm: the {label} operand {_describe(operand)} {reason}"
                self.findings.note(FAULT, what)


class WatchFunctions(TorchFunctionMode):
    """Sees the calls of torch that do not reach the dispatcher."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        note = self.findings.note
        if func is torch.tensor:
            return self._made(func, args, kwargs)
        # A tensor that is there already is given back.
        if func is torch.as_tensor and on_device(kwargs) and not on_gpu(args[0]):
            note(WAIT, "as_tensor on the device")
        if func in (torch.Tensor.numpy, torch.Tensor.tolist):
            tensor = args[0]
            if on_gpu(tensor):
                note(WAIT, f"{func.__name__} of {_describe(tensor)}")
            values = np.full(tuple(tensor.shape), 1.0 if tensor.is_floating_point() else 1)
            return values if func is torch.Tensor.numpy else values.tolist()
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **kwargs)

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if on_device(kwargs):
            self.findings.note(WAIT, f"torch.tensor on the device, of {str(args[0])[:30]}")
            like: Tensor = func(*args, **{**kwargs, "device": "cpu"})
            return torch.empty(like.shape, dtype=like.dtype, device="cuda")
        leaves = list(_leaves(args[0]))
        if any(on_gpu(leaf) for leaf in leaves):
            for _ in leaves:
                self.findings.note(WAIT, "item, in torch.tensor of numbers on the device")
            return torch.empty(len(leaves), dtype=torch.float32)
        made: Tensor = func(*args, **kwargs)
        if isinstance(made, FakeTensor):
            made.constant = None  # else it is computed with, on a device that is not there
        return made


def on_device(kwargs: dict[str, Any]) -> bool:
    """Returns whether a call's ``device`` is the fake one."""
    return torch.device(kwargs.get("device") or "cpu").type == "cuda"
