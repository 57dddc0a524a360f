"""Every redirection and every difference is needed by the installed megatron-core, and works.

When a test here fails after an update of megatron-core, what it names can go. What releases do
differently is told by their number: LATER is 0.19.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core import utils as megatron_utils
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings import (
    rope_utils,
    rotary_pos_embedding,
    yarn_rotary_pos_embedding,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, clip_grads
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.fsdp_dtensor_checkpoint import handle_experts_in_state_dict
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as upstream_experts
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import ProfilerActivity, profile

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.megatron_release import megatron_release
from mone_megatron.model.attention import SDPAttention
from mone_megatron.model.norm import AllHeadsRMSNorm, RMSNorm
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.parallel.groups import open_groups
from mone_megatron.parallel.megatron_compat import (
    attention_modules,
    auxiliary_losses,
    checkpoint_forms,
    cpu_backend,
    cuda_constants,
    cuda_names,
    importing,
    notices,
    prediction_losses,
    token_exchange,
)
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.warm_start import run_python

LATER = megatron_release() >= (0, 19, 0)
CORE = Path(moe_utils.__file__).parents[2]
CUDA_CONSTANTS = set(cuda_constants.CONSTANTS)
HAVE_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None

# Facts about megatron-core as it comes, printed as JSON.
UPSTREAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import megatron.core
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, clip_grads
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

def problem(function, *args):
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__
    return ""

values, weight = torch.ones(2, 3), torch.ones(4, 3)
facts = {
    "has_te_general_gemm": hasattr(moe_utils, "te_general_gemm"),
    "mla_believes_in_te": multi_latent_attention.HAVE_TE,
    "mla_knows_linear": multi_latent_attention.Linear is not None,
    "mla_asks_for": problem(isinstance, values, multi_latent_attention.TELinear),
    "router": problem(moe_utils.router_gating_linear, values, weight, None, torch.float32),
    "split_sizes": type(moe_utils.maybe_move_tensor_to_cpu(torch.ones(2), as_numpy=True)).__name__,
    "get_rng_state": problem(random._get_cuda_rng_state),
    "l2_norm": problem(clip_grads.l2_norm_impl, 0, None, [[values]], False),
    "Tensor.cuda": problem(values.cuda),
    "current_device": problem(torch.cuda.current_device),
    "Stream": problem(torch.cuda.Stream),
    "synchronize": problem(torch.cuda.synchronize),
    "imported": sorted(sys.modules),
}
state = torch.get_rng_state()
torch.rand(1)
random._set_cuda_rng_state(state)
facts["set_rng_state_reaches_cpu"] = torch.equal(torch.get_rng_state(), state)
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
try:
    install_cpu_backend()
except RuntimeError as error:
    facts["install"] = str(error)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def upstream() -> dict[str, Any]:
    """What megatron-core does when imported without this package and without a GPU."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", UPSTREAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


# String constants ----------


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find_definition(module: str, qualified_name: str) -> ast.AST:
    """The definition in the installed source, which no patch has touched."""
    node: ast.AST = parsed(CORE.joinpath(*module.split(".")).with_suffix(".py"))
    for part in qualified_name.split("."):
        (node,) = (
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part
        )
    return node


def strings_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# Of 0.19 only, in the second half.
REWRITES = {
    (module, name): reason
    for module, name, reason in (
        *cuda_constants.CONSTANT_REWRITES,
        *cuda_constants.LATER_CONSTANT_REWRITES * LATER,
    )
}


@pytest.mark.parametrize(("module", "name"), REWRITES)
def test_constants_are_in_the_source_and_gone_from_the_code(module: str, name: str) -> None:
    assert CUDA_CONSTANTS & set(strings_in(find_definition(module, name)))
    function = cuda_constants.resolve(module, name)
    assert cuda_constants.rewrite_code(function.__code__)[1] == 0
    # Rewriting again finds nothing: installing twice is harmless.
    assert cuda_constants.rewrite_constants(module, name) == 0


def test_every_rewrite_has_a_reason_and_stands_once() -> None:
    tables = (cuda_constants.CONSTANT_REWRITES, cuda_constants.LATER_CONSTANT_REWRITES)
    entries = [(module, name) for table in tables for module, name, _ in table]
    assert len(set(entries)) == len(entries)
    assert all(reason for table in tables for _, _, reason in table)


@pytest.mark.parametrize(
    ("module", "name"), [entry[:2] for entry in cuda_constants.LATER_CONSTANT_REWRITES]
)
def test_what_only_the_later_release_has_is_passed_over_in_the_other(
    module: str, name: str
) -> None:
    assert cuda_constants.is_there(module, name) is LATER
    assert not cuda_constants.is_there(module, f"{name}.of_it")


# Where megatron-core says "cuda", by how the names begin, and why no run on a CPU gets there.
NOT_REACHED = {
    "datasets": "data are this project's own",
    "dist_checkpointing.exchange_utils": "each rank reads what it needs by itself",
    "dist_checkpointing.strategies.filesystem_async": "asks whether a tensor is on a GPU",
    "dist_checkpointing.strategies.state_dict_saver.verify_global_md_reuse": "plans are not reused",
    "distributed.fsdp": "Megatron-FSDP is refused",
    "distributed.param_and_grad_buffer._ParamAndGradBuffer.__init__": "only for ddp.nccl_ub",
    "distributed.torch_fully_sharded_data_parallel": "torch's FSDP is not used",
    "energy_monitor": "nobody asks for it",
    "export": "exports are this project's own",
    "extensions.transformer_engine": "Transformer Engine is not used on a CPU",
    "fault_injector": "nobody asks for it",
    "fp8_utils": "fp8 is refused on a CPU",
    "full_cuda_graph": "graphs of whole steps are refused",
    "fusions.fused_indices_converter": "a kernel of the flex dispatcher, which needs a GPU",
    "inference": "no text is generated through it",
    "models": "only other kinds of model say it",
    "nccl_allocator": "NCCL is not used on a CPU",
    "optimizer.cpu_offloading": "it is refused",
    "optimizer.grad_scaler": "scales losses for fp16, which is refused",
    "optimizer.layer_wise_optimizer": "it is refused",
    "pipeline_parallel.combined_1f1b": "overlap_moe_expert_parallel_comm is refused",
    "pipeline_parallel.fine_grained_activation_offload": "it is refused",
    "pipeline_parallel.hybrid_cp_schedule": "hybrid context parallelism is refused",
    "pipeline_parallel.schedules.forward_step": "enable_autocast is refused",
    "pipeline_parallel.utils.set_streams": "only for overlap_moe_expert_parallel_comm",
    "post_training": "nobody quantizes",
    "rerun_state_machine": "steps are repeated by this project's own rules",
    "resharding": "weights are not sent to generating ranks",
    "ssm": "the models have no such layers",
    "tensor_parallel.data": "each rank reads its own batches",
    "tensor_parallel.layers": "the kind of autocast, which nobody turns on",
    "tensor_parallel.random": "helpers that are replaced whole",
    "transformer.cuda_graphs": "CUDA graphs are refused on a CPU",
    "transformer.custom_layers.batch_invariant_kernels": "batch_invariant_mode is refused",
    "transformer.fsdp_dtensor_checkpoint": "Megatron-FSDP is refused",
    "transformer.module": "kinds of tensors, the CPU's beside CUDA's",
    "transformer.moe.moe_layer": "overlap_dispatch_backward_with_experts_wgrad is refused",
    "transformer.moe.moe_utils.track_moe_metrics": "losses are told by this project",
    "transformer.moe.paged_stash": "it is refused",
    "transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.__init__": (
        "only for moe_permute_fusion, which needs Transformer Engine"
    ),
    "transformer.moe.token_dispatcher._HybridEPManager": "it needs a GPU",
    "transformer.utils": "masks for megatron-core's own attention",
    "utils.GlobalSymmetricMemoryBuffer": "for generating text",
    "utils.get_batch_on_this_hybrid_cp_rank": "hybrid context parallelism is refused",
    "utils.local_multi_tensor_l2_norm": "it is replaced whole",
}


def _functions_of_cuda() -> Iterator[str]:
    """Yields ``module.name`` of what says "cuda" in megatron-core's source, of modules too."""
    for path in CORE.rglob("*.py"):
        if not any(constant in path.read_text(encoding="utf-8") for constant in CUDA_CONSTANTS):
            continue
        module = ".".join(path.relative_to(CORE).with_suffix("").parts)
        pending: list[tuple[str, ast.AST]] = [(module, parsed(path))]
        while pending:
            name, node = pending.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    pending.append((f"{name}.{child.name}", child))
                else:
                    pending.append((name, child))
                    if isinstance(child, ast.Constant) and child.value in CUDA_CONSTANTS:
                        yield name


def test_whatever_says_cuda_is_rewritten_or_is_not_reached_on_a_cpu() -> None:
    """Another release may say it in one more function of the path, which fails in a rare moment."""
    found = set(_functions_of_cuda())
    rewritten = {f"{module}.{name}" for module, name in REWRITES}
    assert len(found & rewritten) > 10
    known = tuple(NOT_REACHED) + tuple(rewritten)
    unknown = {name for name in found if not any(f"{name}.".startswith(f"{k}.") for k in known)}
    assert not unknown


def _example(value: int) -> tuple[str, Any, Any]:
    def nested() -> str:
        return "torch.cuda.HalfTensor"

    return "cuda", value in (1, 2) and nested(), "torch.cuda.FloatTensor" in ["cuda", "cpu"]


def test_rewriting_reaches_nested_functions_and_tuples_and_nothing_else() -> None:
    code, changed = cuda_constants.rewrite_code(_example.__code__)
    rewritten = type(_example)(code, globals())
    assert changed == 4
    assert rewritten(1) == ("cpu", "torch.HalfTensor", False)
    assert rewritten(3) == ("cpu", False, False)
    assert _example(1) == ("cuda", "torch.cuda.HalfTensor", False)


# torch.cuda ----------


@pytest.fixture(scope="module")
def names_of_torch_cuda() -> set[str]:
    """Names N that megatron-core's source uses as torch.cuda.N (or torch.cuda.random.N)."""
    names = set()
    for path in CORE.rglob("*.py"):
        if "torch.cuda" not in path.read_text(encoding="utf-8"):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                names.add(node.attr)
    return names


@pytest.mark.parametrize("name", cuda_names.CUDA_REDIRECTIONS)
def test_redirected_functions_are_used_by_megatron_core(
    name: str, names_of_torch_cuda: set[str]
) -> None:
    assert name in names_of_torch_cuda
    assert getattr(torch.cuda, name) is cuda_names.CUDA_REDIRECTIONS[name]


def test_functions_fail_without_redirection(upstream: dict[str, Any]) -> None:
    for name in ("current_device", "Stream", "synchronize", "Tensor.cuda"):
        assert upstream[name], f"{name} works without a GPU"


def test_streams_and_events_do_nothing_in_order() -> None:
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.default_stream().wait_event(event)
        event.record(stream)
    assert stream.record_event(event) is event
    stream.record_event().wait()
    event.synchronize()
    stream.synchronize()


def test_random_state_is_the_cpu_generators() -> None:
    before = torch.get_rng_state()
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    state = torch.cuda.get_rng_state()
    second = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), second)
    torch.set_rng_state(before)


def test_tensors_stay_and_upstream_moves_tied_embeddings() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor
    method = "LanguageModule.setup_embeddings_and_output_layer"
    source = find_definition("models.common.language_module.language_module", method)
    assert ".cuda()" in ast.unparse(source)


# Functions replaced whole ----------


def test_upstream_random_helpers_know_only_cuda(upstream: dict[str, Any]) -> None:
    assert upstream["get_rng_state"]
    assert not upstream["set_rng_state_reaches_cpu"]


@pytest.mark.usefixtures("one_process")
def test_the_rng_tracker_forks_and_returns() -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with tracker.fork():
        forked = torch.rand(2)
    with tracker.fork():
        assert not torch.equal(torch.rand(2), forked)  # its own stream goes on
    assert torch.equal(torch.rand(2), expected)  # and the outer one is untouched


@pytest.mark.skipif(HAVE_TRANSFORMER_ENGINE, reason="Transformer Engine is installed")
def test_the_router_needs_te_general_gemm_to_exist(upstream: dict[str, Any]) -> None:
    # From 0.17 on upstream says None itself.
    assert upstream["has_te_general_gemm"] is LATER
    assert upstream["router"] == ("" if LATER else "NameError")
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    logits = moe_utils.router_gating_linear(x, weight, None, torch.float32)
    torch.testing.assert_close(logits, x @ weight.T)


@pytest.mark.skipif(HAVE_TRANSFORMER_ENGINE, reason="Transformer Engine is installed")
def test_latent_attention_takes_mocks_for_transformer_engine(upstream: dict[str, Any]) -> None:
    # 0.19 knows that Transformer Engine is missing, and then forgets its own linear layer.
    assert upstream["mla_believes_in_te"] is not LATER
    assert upstream["mla_knows_linear"] is not LATER
    assert upstream["mla_asks_for"] == "TypeError"
    assert not multi_latent_attention.HAVE_TE
    assert multi_latent_attention.Linear is Linear


def test_split_sizes_become_numpy_on_cpu(upstream: dict[str, Any]) -> None:
    assert upstream["split_sizes"] == "Tensor"
    sizes = torch.tensor([3, 1])
    for module in (moe_utils, token_dispatcher):
        assert type(module.maybe_move_tensor_to_cpu(sizes, as_numpy=True)).__name__ == "ndarray"
        assert module.maybe_move_tensor_to_cpu(sizes) is sizes
        assert module.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def test_angles_of_a_context_rank_need_no_pinned_memory() -> None:
    module = "models.common.embeddings.rope_utils"
    source = ast.unparse(find_definition(module, "get_pos_emb_on_this_cp_rank"))
    assert "pin_memory=True" in source

    class Group:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 1

    angles = torch.arange(8.0).view(8, 1)
    for holder in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        mine = holder.get_pos_emb_on_this_cp_rank(angles, 0, Group())
        assert mine.flatten().tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.usefixtures("one_process")
def test_the_whole_step_of_megatron_core_runs_on_cpu() -> None:
    """The training step of this project is another, and goes past parts of it."""
    weight = nn.Parameter(torch.ones(2, 2))
    weight.main_grad = torch.full((2, 2), 2.0)  # type: ignore[attr-defined]
    adam = torch.optim.SGD([weight], lr=1.0)
    config = OptimizerConfig(optimizer="sgd", lr=1.0, clip_grad=1.0, log_num_zeros_in_grad=True)
    groups = parallel_state.get_model_parallel_group()
    for wrap in (lambda one: one, lambda one: ChainedOptimizer([one])):
        weight.data.fill_(1.0)
        weight.main_grad = torch.full((2, 2), 2.0)  # type: ignore[attr-defined]
        part = FP32Optimizer(adam, config, lambda optimizer, config: None)
        part.grad_stats_parallel_group = groups
        optimizer = wrap(part)
        assert optimizer.step() == (True, 4.0, 0.0)
        torch.testing.assert_close(weight.data, torch.full((2, 2), 0.5))


def test_gradient_norm_stays_on_cpu(upstream: dict[str, Any]) -> None:
    assert upstream["l2_norm"]
    tensors = [torch.full((3,), 2.0), torch.full((2, 2), 1.0)]
    norm, _ = clip_grads.l2_norm_impl(0, None, [tensors], False)
    assert norm.tolist() == [4.0]
    assert norm.dtype is torch.float32


@pytest.mark.parametrize("value", [1e-25, 1e-12, 1e25])
@pytest.mark.parametrize("size", [4, 4096, 10_000])
def test_gradient_norm_is_right_where_fp32_has_no_such_squares(size: int, value: float) -> None:
    norm, _ = clip_grads.l2_norm_impl(0, None, [[torch.full((size,), value)]], False)
    assert norm.item() == pytest.approx(value * size**0.5, rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [1, 2**15, 2**15 + 1, 100_000])
def test_gradient_norm_goes_over_blocks(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    expected = values.double().square().sum().sqrt().item()
    norm, _ = clip_grads.l2_norm_impl(0, None, [[values.view(1, size)]], False)
    assert norm.item() == pytest.approx(expected, rel=1e-7)
    # Of gradients in bf16, too, whose coarse values round alike.
    narrow = values.bfloat16()
    norm, _ = clip_grads.l2_norm_impl(0, None, [[narrow]], False)
    assert norm.item() == pytest.approx(narrow.double().norm().item(), rel=1e-6)
    values[-1] = torch.nan
    assert clip_grads.l2_norm_impl(0, None, [[values]], False)[0].isnan().all()
    values[-1] = torch.inf
    assert clip_grads.l2_norm_impl(0, None, [[values]], False)[0].isinf().all()


def _operations(function: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


def test_upstream_copies_gradients_to_clip_them() -> None:
    ours, theirs = torch.arange(4.0), torch.arange(4.0)
    arguments = 2**16, None
    assert "aten::mul_" not in _operations(
        lambda: megatron_utils.local_multi_tensor_scale(*arguments, [[theirs], [theirs]], 0.3)
    )
    assert "aten::mul_" in _operations(
        lambda: clip_grads.multi_tensor_scale_impl(*arguments, [[ours], [ours]], 0.3)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("whole", [True, False])
def test_upstream_puts_rotated_halves_together_in_copies(whole: bool) -> None:
    rotate = rope_utils._apply_rotary_pos_emb_bshd
    heads = torch.randn(5, 2, 3, 8 if whole else 10)
    angles = torch.randn(5, 1, 1, 8)
    ours, theirs = rotate(heads, angles), rotate.__wrapped__(heads, angles)
    assert torch.equal(ours, theirs)
    assert "aten::cat" in _operations(lambda: rotate.__wrapped__(heads, angles))
    # Heads of which a part is rotated are left to it, as is every other way.
    assert ("aten::cat" in _operations(lambda: rotate(heads, angles))) is not whole
    scaled = rotate(heads, angles, mscale=2.0)
    assert torch.equal(scaled, rotate.__wrapped__(heads, angles, mscale=2.0))
    pairs = rotate(heads, angles, rotary_interleaved=True)
    assert torch.equal(pairs, rotate.__wrapped__(heads, angles, rotary_interleaved=True))


def test_fused_functions_are_not_compiled() -> None:
    from megatron.core.jit import jit_fuser

    def plain(x: Tensor) -> Tensor:
        return x

    assert jit_fuser(plain) is plain
    assert torch.compile is not jit_fuser


def _uneven_collectives() -> dict[str, Any]:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    sizes = [3, 1]
    parts = [torch.arange(6.0).view(3, 2), torch.full((1, 2), 9.0)]
    outputs = [torch.empty_like(part) for part in parts]
    try:
        dist.all_gather(outputs, parts[rank])
        upstream_problem = ""
    except RuntimeError as error:
        upstream_problem = str(error)
    mine = parts[rank].clone().requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(
        mine, group=group, output_split_sizes=sizes
    )
    (gradient,) = torch.autograd.grad(gathered, mine, torch.arange(8.0).view(4, 2) * (rank + 1))
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(
        torch.arange(8.0).view(4, 2) * (rank + 1), group=group, input_split_sizes=sizes
    )
    even = mappings.gather_from_sequence_parallel_region(torch.full((2,), float(rank)), group=group)
    return {
        "upstream": upstream_problem,
        "gathered": gathered.tolist(),
        "gradient": gradient.tolist(),
        "scattered": scattered.tolist(),
        "even": even.tolist(),
    }


def test_parts_of_different_lengths_over_gloo(two_processes: Processes) -> None:
    by_rank = two_processes.run(_uneven_collectives)
    summed = [[0.0, 3.0], [6.0, 9.0], [12.0, 15.0], [18.0, 21.0]]
    for rank, result in enumerate(by_rank):
        assert "invalid tensor size" in result["upstream"]
        assert result["gathered"] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [9.0, 9.0]]
        assert result["gradient"] == result["scattered"] == (summed[:3], summed[3:])[rank]
        assert result["even"] == [0.0, 0.0, 1.0, 1.0]


# Installation ----------


@pytest.mark.parametrize("package", importing.DEFERRED)
def test_packages_are_imported_by_upstream_and_by_us_when_used(
    upstream: dict[str, Any], package: str
) -> None:
    """In a process of its own, since another test may have used it in this one."""
    assert len([name for name in upstream["imported"] if name.startswith(f"{package}.")]) > 10
    code = f"""
import json, sys
def of_it():
    return [name for name in sys.modules if name.startswith("{package}.")]
seen = [len(of_it())]
import {package}
seen.append(len(of_it()))
from megatron.core import timers
timers.{package}.__version__
import {package} as again
print(json.dumps([*seen, len(of_it()), timers.{package}.__version__ == again.__version__,
    type(again).__name__, again.__name__]))
"""
    done = run_python(["-c", code], folder=Path.cwd())
    assert done.returncode == 0, done.stderr
    before, named, used, *rest = json.loads(done.stdout)
    assert (before, named) == (0, 0)
    assert used > 10
    assert rest == [True, "module", package]


def test_a_deferred_package_is_imported_once_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("import time; time.sleep(0.2); started = []\n")
    (folder / "part.py").write_text("inside = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    importing.defer("slow_package")
    deferred = sys.modules["slow_package"]
    importing.defer("slow_package")
    importing.defer("a_package_that_nobody_has")
    assert sys.modules["slow_package"] is deferred
    assert "a_package_that_nobody_has" not in sys.modules
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: id(deferred.started), range(8)))
    assert len(set(found)) == 1
    with pytest.raises(AttributeError, match="nothing_of_it"):
        _ = deferred.nothing_of_it
    # As importing a part before the whole does.
    del sys.modules["slow_package"]
    importing.defer("slow_package")
    assert importlib.import_module("slow_package.part").inside == 7


def test_installing_again_changes_nothing() -> None:
    before = (mappings._gather_along_first_dim, moe_utils.maybe_move_tensor_to_cpu)
    cpu_backend.install_cpu_backend()
    assert (mappings._gather_along_first_dim, moe_utils.maybe_move_tensor_to_cpu) == before


def test_installing_after_a_foreign_import_is_refused(upstream: dict[str, Any]) -> None:
    assert upstream["install"].startswith("install_cpu_backend() must be called before megatron")


# The traps that this file's neighbours guard against ----------


def test_upstreams_norm_refuses_sequence_parallelism_and_ours_marks_its_weight() -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        cuda_graph_scope=[],
    )
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 8)
    norm = RMSNorm(config, 8, eps=1e-6)
    assert norm.weight.sequence_parallel is True
    x = torch.randn(3, 8)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(norm(x), expected)
    config.sequence_parallel = False
    assert RMSNorm(config, 8).weight.sequence_parallel is False


def _expert_marks(parallel: ParallelConfig) -> dict[str, set[bool]]:
    """``allreduce`` of expert parameters: True when reduced like dense ones, over all of DP."""
    open_groups(parallel, TrainConfig(), timeout_seconds=300)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=2,
        moe_ffn_hidden_size=16,
        ffn_hidden_size=16,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel.tensor,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        cuda_graph_scope=[],
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    backend = LocalSpecProvider()
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    local = 2 // parallel.expert
    modules: dict[str, nn.Module] = {
        "SequentialMLP": upstream_experts.SequentialMLP(
            local, config, submodules=linears, pg_collection=groups
        ),
        "ours": GroupedExperts(local, config, groups),
    }
    if not LATER:
        # It only checks that grouped_gemm is installed; its parameters need nothing of it.
        upstream_experts.gg.assert_grouped_gemm_is_available = lambda: None
        modules["GroupedMLP"] = upstream_experts.GroupedMLP(local, config, groups)
    marks = {
        name: {bool(parameter.allreduce) for parameter in module.parameters()}
        for name, module in modules.items()
    }
    expert_ranks = dist.get_process_group_ranks(parallel_state.get_expert_data_parallel_group())
    dense_ranks = dist.get_process_group_ranks(
        parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    marks["groups_agree"] = {expert_ranks == dense_ranks}
    return marks


@pytest.mark.parametrize(
    ("parallel", "upstream_marks", "our_marks", "groups_agree"),
    [
        # The trap: copies of the experts on the tensor-parallel ranks, never reduced.
        (ParallelConfig(tensor=2), True, False, False),
        # The other way around: halves of the experts would be averaged.
        (ParallelConfig(expert_tensor=2), True, False, False),
        (ParallelConfig(tensor=2, expert_tensor=2), True, True, True),
        (ParallelConfig(), True, True, True),
        (ParallelConfig(expert=2), False, False, False),
        (ParallelConfig(tensor=2, expert=2), False, False, True),
    ],
    ids=["tp2_etp1", "tp1_etp2", "tp2_etp2", "dp2", "ep2", "tp2_ep2"],
)
def test_expert_gradients_are_reduced_over_the_ranks_that_hold_copies(
    two_processes: Processes,
    parallel: ParallelConfig,
    upstream_marks: bool,
    our_marks: bool,
    groups_agree: bool,
) -> None:
    for marks in two_processes.run(_expert_marks, parallel):
        assert marks["ours"] == {our_marks}
        # Reducing over all of DP is right only where those ranks hold the same experts.
        assert marks["groups_agree"] == {groups_agree}
        assert groups_agree or not our_marks
        # When one of these fails, upstream has changed its rule. 0.19 mended it.
        expected = our_marks if LATER else upstream_marks
        assert marks["SequentialMLP"] == {expected}
        assert LATER or marks["GroupedMLP"] == {expected}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("experts", [None, 4])
def test_upstream_scales_auxiliary_losses_in_models_with_experts_only(experts: int | None) -> None:
    scaler = moe_utils.MoEAuxLossAutoScaler
    auxiliary_losses.scale_layer_losses(microbatches=4, context_ranks=2)
    ours = scaler.main_loss_backward_scale
    assert ours is not None
    assert float(ours) == 0.5

    scaler.main_loss_backward_scale = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=experts
        )
    schedules.forward_step_calc_loss(
        model=None,
        output_tensor=torch.tensor(1.0),
        loss_func=lambda output: (output, output.detach()),
        config=config,
        vp_stage=None,
        collect_non_loss_data=False,
        num_microbatches=4,
        forward_data_store=[],
        cp_group_size=2,
        is_last_stage=True,
    )
    theirs = scaler.main_loss_backward_scale
    assert theirs is None if experts is None else float(theirs) == float(ours)


# Differences between releases ----------


@pytest.mark.usefixtures("one_process")
def test_auxiliary_losses_are_forgotten_where_upstream_hands_out_a_copy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        moe_utils.save_to_aux_losses_tracker("some_loss", torch.tensor(2.0), 1, 3)
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        assert bool(auxiliary_losses.layer_losses()) is LATER  # else the clearing was enough
        moe_utils.save_to_aux_losses_tracker("some_loss", torch.tensor(3.0), 2, 3)
    losses = auxiliary_losses.layer_losses()["some_loss"]
    assert losses.tolist() == [2.0 if LATER else 0.0, 3.0, 0.0]
    auxiliary_losses.zero_layer_losses()
    assert losses.tolist() == auxiliary_losses.layer_losses()["some_loss"].tolist() == [0.0] * 3
    # Of another number of layers next time: zeros would not do.
    auxiliary_losses.forget_layer_losses()
    assert auxiliary_losses.layer_losses() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        moe_utils.save_to_aux_losses_tracker("some_loss", torch.tensor(4.0), 5, 5)
    assert auxiliary_losses.layer_losses()["some_loss"].tolist() == [0.0] * 4 + [4.0]


def test_layers_of_multi_token_prediction_have_one_name_in_checkpoints() -> None:
    from megatron.core.transformer import multi_token_prediction as upstream

    later = megatron_release() >= (0, 17, 0)
    here = "mtp_model_layer" if later else "transformer_layer"
    fields = upstream.MultiTokenPredictionLayerSubmodules.__dataclass_fields__
    assert {here} == {"mtp_model_layer", "transformer_layer"} & fields.keys()
    assert (
        checkpoint_forms.stored_name(f"mtp.layers.1.{here}.mlp.router.weight")
        == "mtp.layers.1.transformer_layer.mlp.router.weight"
    )
    for name in ("mtp.layers.0.eh_proj.weight", "decoder.layers.0.mtp_model_layer.weight"):
        assert checkpoint_forms.stored_name(name) == name


def test_rows_of_routers_that_vary_their_number_are_counted() -> None:
    from megatron.core.transformer.moe.moe_utils import permute

    class Dispatcher:
        num_out_tokens = 0

        def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
            self.num_out_tokens = 2 * len(routing_map)  # upstream's: two experts a token
            return routing_map.sum(dim=0)

    dispatcher = Dispatcher()
    token_exchange.count_rows_sent(dispatcher)
    rows = torch.arange(4.0).view(4, 1)
    for chosen in ([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], [[1, 1, 1]] * 4, [[0, 0, 1]] * 4):
        routing_map = torch.tensor(chosen).bool()
        expected = torch.cat([rows[routing_map[:, expert]] for expert in range(3)])
        assert dispatcher.preprocess(routing_map).tolist() == routing_map.sum(dim=0).tolist()
        sent = permute(rows, routing_map, num_out_tokens=dispatcher.num_out_tokens)[0]
        assert torch.equal(sent, expected)
        # Upstream's number is wrong from 0.17 on, where it is believed.
        taken = permute(rows, routing_map, num_out_tokens=8)[0]
        assert torch.equal(taken, expected) == (megatron_release() < (0, 17, 0))


def test_losses_of_multi_token_prediction_are_taken_once_and_forgotten() -> None:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    assert hasattr(MTPLossLoggingHelper, "save_metrics_to_tracker") == (
        megatron_release() >= (0, 17, 0)
    )
    prediction_losses.forget_prediction_losses()
    assert prediction_losses.take_prediction_losses(2).tolist() == [0.0, 0.0]
    for loss in (1.0, 2.0):
        if hasattr(MTPLossLoggingHelper, "save_metrics_to_tracker"):
            one = torch.tensor(1.0)
            MTPLossLoggingHelper.save_metrics_to_tracker(torch.tensor(loss), one, one, 1, 2)
        else:
            MTPLossLoggingHelper.save_loss_to_tracker(torch.tensor(loss), 1, 2)
    assert prediction_losses.take_prediction_losses(2).tolist() == [0.0, 3.0]
    assert prediction_losses.take_prediction_losses(2).tolist() == [0.0, 0.0]
    prediction_losses.forget_prediction_losses()
    assert MTPLossLoggingHelper.tracker == {}


def test_saving_is_left_to_our_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    save = dist_checkpointing.save
    parameter = inspect.signature(save).parameters.get("async_strategy")
    assert (parameter is not None) is LATER
    ours = {"async_strategy": "mcore"} if LATER else {}
    assert checkpoint_forms.own_writer() == ours
    assert parameter is None or parameter.default != "mcore"
    # One who looks at what is saved hides what it takes.
    monkeypatch.setattr(dist_checkpointing, "save", lambda *args, **kwargs: save(*args, **kwargs))
    assert checkpoint_forms.own_writer() == ours


@pytest.mark.usefixtures("one_process")
def test_what_is_no_tensor_lies_where_the_release_keeps_it(tmp_path: Path) -> None:
    tensor = dist_checkpointing.ShardedTensor.from_rank_offsets("w", torch.ones(2))
    dist_checkpointing.save({"w": tensor, "step": 3}, str(tmp_path))
    assert (tmp_path / checkpoint_forms.COMMON).exists() is not LATER
    assert checkpoint_forms.unreadable_form(tmp_path) is None
    (tmp_path / checkpoint_forms.COMMON).unlink(missing_ok=True)
    problem = checkpoint_forms.unreadable_form(tmp_path)
    assert (problem is None) is LATER
    assert problem is None or "a newer megatron-core than the installed 0.16.1 wrote it" in problem


def test_megatron_fsdp_has_one_form_of_its_own_for_an_optimizers_state() -> None:
    """Why megatron.ddp.use_megatron_fsdp is refused (docs/parallelism.md, Not run here)."""
    method = "DistributedOptimizer.sharded_state_dict"
    source = ast.unparse(find_definition("optimizer.distrib_optimizer", method))
    _, refusal = source.split("if self.ddp_config.use_megatron_fsdp and sharding_type != ", 1)
    assert refusal.split()[:3] == [
        "'fsdp_dtensor':",
        "raise",
        "NotImplementedError(f'sharding_type",
    ]


def _experts_saved_as_megatron_fsdp_would(folder: Path) -> tuple[float, float]:
    """Returns the expert of this rank, one of two, and what is loaded of it again."""
    open_groups(ParallelConfig(expert=2), TrainConfig(), timeout_seconds=300)
    ours = "module.decoder.layers.0.mlp.experts.down_weight"
    theirs = "module.decoder.layers.0.mlp.experts.linear_fc2.weight"
    rank = dist.get_rank()
    named = handle_experts_in_state_dict({ours: 0, f"{theirs}0": 0}, num_experts=2)
    assert set(named) == {ours, f"{theirs}{rank}"}
    # An expert-parallel rank's mesh has the ranks with the same experts: itself alone, here.
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mesh = DeviceMesh.from_group(groups[rank], "cpu")
    weight = DTensor.from_local(torch.full((2, 2), float(rank)), mesh, [Shard(0)])
    checkpoint.save({ours: weight}, checkpoint_id=folder)
    loaded = DTensor.from_local(torch.full((2, 2), -1.0), mesh, [Shard(0)])
    checkpoint.load({ours: loaded}, checkpoint_id=folder)
    return float(weight.to_local()[0, 0]), float(loaded.to_local()[0, 0])


def test_megatron_fsdp_saves_the_experts_of_one_rank_over_those_of_another(
    two_processes: Processes, tmp_path: Path
) -> None:
    """Why it is refused, too: it tells experts of ranks apart by names of its own modules."""
    saved = two_processes.run(_experts_saved_as_megatron_fsdp_would, tmp_path)
    assert [before for before, _ in saved] == [0.0, 1.0]
    assert len({after for _, after in saved}) == 1


def _attention(kind: type, *, norm: type | ModuleSpec) -> nn.Module:
    """An attention layer whose configuration knows of no norms, with norms in its spec."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
    )
    spec = ModuleSpec(
        module=kind,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    module = build_module(spec, config=config, layer_number=1)
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.usefixtures("one_process")
def test_norms_of_a_spec_are_refused_by_upstream_and_built_by_ours() -> None:
    all_heads = ModuleSpec(module=AllHeadsRMSNorm, params={"num_heads": 2})
    if LATER:
        with pytest.raises(ValueError, match="qk_layernorm/qk_l2_norm are disabled"):
            _attention(SelfAttention, norm=all_heads)
    else:
        assert isinstance(_attention(SelfAttention, norm=all_heads).q_layernorm, AllHeadsRMSNorm)
    ours = _attention(attention_modules.self_attention(), norm=all_heads)
    assert isinstance(ours.q_layernorm, AllHeadsRMSNorm)
    assert isinstance(ours.k_layernorm, AllHeadsRMSNorm)
    # In this order they are numbered and initialised.
    assert [name for name, _ in ours.named_parameters()] == [
        "linear_proj.weight",
        "linear_qkv.weight",
        "q_layernorm.weight",
        "k_layernorm.weight",
    ]


def test_latent_attention_has_a_place_for_the_specs_modules() -> None:
    name = "_resolve_qk_norm_config"
    assert hasattr(MLASelfAttention, name) is LATER
    assert name in vars(attention_modules.latent_attention())


@pytest.mark.parametrize(("module", "start", "release"), notices.NOTICES)
def test_notices_that_are_kept_quiet_are_still_given(
    module: str, start: str, release: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = CORE.joinpath(*module.split(".")).with_suffix(".py")
    # One that the installed release does not give may go when the other does not, either.
    assert (start in path.read_text(encoding="utf-8")) is ((release == "0.19") is LATER)
    logger = logging.getLogger(f"megatron.core.{module}")
    logger.warning(f"{start} and more")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
