"""Stands in for Triton's launches: arguments are checked, variants are counted, nothing runs."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from torch import Tensor

from mone_megatron.testing.fake_cuda.watch import on_gpu

_OPTIONS = {"num_warps", "num_stages"}


class _Pointer:
    """Is a tensor as Triton sees it: a dtype, and an address that is aligned or not.

    Memory on a GPU begins at multiples of 512 bytes, so what a tensor's place in it says holds.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = 512 + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """Returns the address."""
        return self.address


@cache
def _binder(kernel: Any) -> Any:
    """Returns Triton's own function from arguments to what a variant depends on."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def variant(kernel: Any, *args: Any, **named: Any) -> str:
    """Returns what Triton compiles once for: equal for calls that share a compiled kernel.

    Args:
        kernel: the kernel.
        args: as of a launch; tensors may be on any device.
        named: the same, and options of the launch.
    """
    given = [_Pointer(value) if isinstance(value, Tensor) else value for value in args]
    _, specialization, options = _binder(kernel)(*given, **named)
    return f"{[_told(part) for part in specialization]} {options}"


def _told(part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_told(one) for one in part]
    return getattr(part, "__name__", part)


class CheckedKernel:
    """Takes the launches of a kernel in its place."""

    def __init__(self, name: str, kernel: Any, launches: Counter[str]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches
        # As a kernel of Triton keeps what it has compiled, by device; here nothing is compiled.
        self.device_caches: dict[int, tuple[dict[str, None]]] = {0: ({},)}

    def __getitem__(self, grid: Any) -> Any:
        """Returns what is called with the arguments of a launch over ``grid``."""
        parameters = self.kernel.arg_names

        def launch(*args: Any, **named: Any) -> None:
            given = dict(zip(parameters, args, strict=False)) | named
            assert set(parameters) <= set(given), (self.name, "lacks arguments")
            extra = set(given) - set(parameters) - _OPTIONS
            assert not extra, (self.name, extra)
            for parameter, value in given.items():
                if isinstance(value, Tensor):
                    assert on_gpu(value), f"{self.name}: {parameter} is on {value.device}"
            constants = {k: getattr(v, "__name__", v) for k, v in given.items() if k.isupper()}
            self.launches[f"{self.name} {constants}"] += 1
            self.device_caches[0][0][variant(self.kernel, *args, **named)] = None

        return launch


def check_launches(launches: Counter[str]) -> None:
    """Replaces every kernel that :mod:`mone_megatron.kernels.fused` launches."""
    from mone_megatron.kernels import fused

    for name, kernel in list(vars(fused).items()):
        if hasattr(kernel, "arg_names") and hasattr(kernel, "run"):
            setattr(fused, name, CheckedKernel(name, kernel, launches))


def variants() -> list[str]:
    """Returns the variants that were launched so far, each with its kernel's name."""
    from mone_megatron.kernels import fused

    return [
        f"{kernel.name} {kind}"
        for kernel in vars(fused).values()
        if isinstance(kernel, CheckedKernel)
        for kind in kernel.device_caches[0][0]
    ]
