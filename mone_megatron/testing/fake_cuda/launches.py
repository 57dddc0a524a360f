"""Stands in for Triton's launches: their arguments are checked and counted, nothing runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from mone_megatron.testing.fake_cuda.watch import on_gpu

_OPTIONS = {"num_warps", "num_stages"}


class CheckedKernel:
    """Has the name and parameters of a kernel, and takes its launches in its place."""

    def __init__(self, name: str, parameters: list[str], launches: Counter[str]) -> None:
        self.name, self.parameters, self.launches = name, parameters, launches

    def __getitem__(self, grid: Any) -> Any:
        """Returns what is called with the arguments of a launch over ``grid``."""

        def launch(*args: Any, **named: Any) -> None:
            given = dict(zip(self.parameters, args, strict=False)) | named
            assert set(self.parameters) <= set(given), (self.name, "lacks arguments")
            extra = set(given) - set(self.parameters) - _OPTIONS
            assert not extra, (self.name, extra)
            for parameter, value in given.items():
                if isinstance(value, Tensor):
                    assert on_gpu(value), f"{self.name}: {parameter} is on {value.device}"
            constants = {k: getattr(v, "__name__", v) for k, v in given.items() if k.isupper()}
            self.launches[f"{self.name} {constants}"] += 1

        return launch


def check_launches(launches: Counter[str]) -> None:
    """Replaces every kernel that :mod:`mone_megatron.kernels.fused` launches."""
    from mone_megatron.kernels import fused

    for name, kernel in list(vars(fused).items()):
        if hasattr(kernel, "arg_names") and hasattr(kernel, "run"):
            setattr(fused, name, CheckedKernel(name, kernel.arg_names, launches))
