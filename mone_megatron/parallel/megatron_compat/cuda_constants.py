"""Replaces string constants that name CUDA in functions of megatron-core, in their code objects."""

from __future__ import annotations

import importlib
import types
from typing import Any

# Constants of CUDA-only code and what they mean on a CPU.
CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# (module, function or Class.method): why it is on our path.
CONSTANT_REWRITES: tuple[tuple[str, str, str], ...] = (
    ("optimizer.clip_grads", "get_grad_norm_fp32", 'norm buffers made with device="cuda"'),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", "asserts a CUDA gradient type"),
    ("optimizer.clip_grads", "count_zeros_fp32", 'counter made with device="cuda"'),
    ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__", "overflow buffers on CUDA"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__", "CUDA type names"),
    ("optimizer.optimizer", "FP32Optimizer.__init__", "loss scale on CUDA"),
    (
        "optimizer.distrib_optimizer",
        "DistributedOptimizer._build_model_and_main_param_groups",
        "CUDA type names decide which parameters get fp32 masters",
    ),
    (
        "optimizer.distrib_optimizer",
        "DistributedOptimizer.__init__",
        "CUDA type names decide which parameters have an fp32 copy",
    ),
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining", "token counter on CUDA"),
    (
        "pipeline_parallel.schedules",
        "forward_backward_pipelining_without_interleaving",
        "token counter on CUDA",
    ),
    (
        "pipeline_parallel.schedules",
        "forward_backward_pipelining_with_interleaving",
        "token counter on CUDA",
    ),
)

# Of 0.19; 0.16 has no such function.
LATER_CONSTANT_REWRITES: tuple[tuple[str, str, str], ...] = (
    (
        "optimizer.optimizer",
        "MegatronOptimizer.has_grad_norm_group",
        "asks all ranks, by a flag on CUDA, for parameters that are clipped apart",
    ),
)


def rewrite_code(code: types.CodeType) -> tuple[types.CodeType, int]:
    """Returns ``code`` with its CUDA constants replaced, nested functions' too, and how many."""
    changed = 0
    constants = []
    for constant in code.co_consts:
        new: Any = constant
        if isinstance(constant, types.CodeType):
            new, count = rewrite_code(constant)
            changed += count
        elif isinstance(constant, str) and constant in CONSTANTS:
            new = CONSTANTS[constant]
            changed += 1
        elif isinstance(constant, tuple) and any(item in CONSTANTS for item in constant):
            new = tuple(CONSTANTS.get(item, item) for item in constant)
            changed += 1
        constants.append(new)
    return (code.replace(co_consts=tuple(constants)), changed) if changed else (code, 0)


def is_there(module: str, qualified_name: str) -> bool:
    """Returns whether the installed megatron-core's module has something by this name."""
    target: Any = importlib.import_module(f"megatron.core.{module}")
    for part in qualified_name.split("."):
        if not hasattr(target, part):
            return False
        target = getattr(target, part)
    return True


def resolve(module: str, qualified_name: str) -> types.FunctionType:
    """Returns the function that megatron-core's module has by this name, below any wrapper."""
    target: Any = importlib.import_module(f"megatron.core.{module}")
    for part in qualified_name.split("."):
        target = getattr(target, part)
    if isinstance(target, types.MethodType):  # a classmethod
        target = target.__func__
    while hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    assert isinstance(target, types.FunctionType), (module, qualified_name)
    return target


def rewrite_constants(module: str, qualified_name: str) -> int:
    """Replaces the CUDA constants of one megatron-core function in place.

    Returns:
        How many constants were replaced.
    """
    function = resolve(module, qualified_name)
    function.__code__, changed = rewrite_code(function.__code__)
    return changed


def rewrite_all_constants() -> None:
    """Replaces the constants of all functions of the tables above that the release has."""
    for module, function, _ in CONSTANT_REWRITES:
        rewrite_constants(module, function)
    for module, function, _ in LATER_CONSTANT_REWRITES:
        if is_there(module, function):
            rewrite_constants(module, function)
