"""What megatron-core and we call of Transformer Engine takes the arguments that it is given.

Signatures are recorded from its sources (:mod:`te_signatures`): nothing of it runs here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from typing import Any

import pytest
import te_signatures
import torch
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from te_signatures import VERSIONS, Call, calls, signature

from mone_megatron.kernels.te_grouped import grouped_mm


@functools.cache
def found() -> list[Call]:
    """All calls, which take a second to find: not while tests are collected, by every worker."""
    return list(calls())


def _refused(call: Call, taken: inspect.Signature) -> str | None:
    bind = taken.bind_partial if call.more else taken.bind
    try:
        bind(*[None] * call.positional, **dict.fromkeys(call.named))
    except TypeError as error:
        return f"{call.place}: {call.called}() {error}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_of_megatron_core_are_taken(version: str) -> None:
    refused = [_refused(call, signature(version, call.called)) for call in found()]
    assert [text for text in refused if text] == []


def test_all_that_is_recorded_is_called() -> None:
    """What is found in the sources: else nothing is tested above."""
    counted = Counter(call.called for call in found())
    # We call the first ourselves, and megatron-core the others with what a dictionary holds.
    apart = {"general_grouped_gemm", "FusedAdam", "make_graphed_callables"}
    assert set(counted) == set(te_signatures._SOURCES) - apart
    assert sum(len(call.named) + call.positional for call in found()) > 100


@pytest.mark.parametrize("version", VERSIONS)
def test_an_argument_that_is_gone_is_found(version: str) -> None:
    called = Counter(call.called for call in found())
    for name in called:
        taken = signature(version, name)
        named = next(call for call in found() if call.called == name)
        if named.named and "kwargs" not in taken.parameters:
            less = [part for part in taken.parameters.values() if part.name != named.named[0]]
            assert _refused(named, taken.replace(parameters=less)) is not None


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_optimizer_is_made_with_is_taken(version: str) -> None:
    """As megatron.core.optimizer makes it, whose arguments are built step by step."""
    named = ("lr", "weight_decay", "betas", "eps", "adam_w_mode")
    precise = ("exp_avg_dtype", "exp_avg_sq_dtype", "use_decoupled_grad", "master_weights",
               "master_weight_dtype", "store_param_remainders")  # fmt: skip
    signature(version, "FusedAdam").bind(None, **dict.fromkeys((*named, *precise)))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_graphs_are_made_with_is_taken(version: str) -> None:
    """By TECudaGraphHelper, whose arguments are built step by step."""
    source = textwrap.dedent(inspect.getsource(TECudaGraphHelper._get_cuda_graph_input_data))
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "kwargs":
            named.add(ast.literal_eval(node.slice))
        elif isinstance(node, ast.Dict):
            named |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    assert {"_order", "num_warmup_iters", "sample_kwargs", "fp8_enabled"} <= named
    # Beside fine_grained_activation_offloading, which is refused.
    named -= {"pre_warmup_hook", "post_warmup_hook"}
    signature(version, "make_graphed_callables").bind(None, None, **dict.fromkeys(named))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("transposed", [True, False])
def test_our_grouped_products_are_taken(version: str, *, transposed: bool) -> None:
    taken, bound = signature(version, "general_grouped_gemm"), []

    def gemm(*args: Any, **named: Any) -> None:
        arguments = taken.bind(*args, **named).arguments
        bound.append(arguments["layout"])
        for out in arguments["out"]:
            out.zero_()

    weight = torch.ones(2, 3, 4, requires_grad=True)
    rows = torch.ones(5, 4 if transposed else 3, requires_grad=True)
    matrices = weight.mT if transposed else weight
    grouped_mm(rows, matrices, torch.tensor([2, 3]), gemm).sum().backward()
    assert sorted(bound) == sorted(
        ("TN" if transposed else "NN", "NN" if transposed else "TN", "NT")
    )
