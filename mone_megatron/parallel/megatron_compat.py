"""Holds all workarounds for megatron-core and differences of its releases; no other file does.

Releases: 0.16.1 (the last for Python 3.10 and 3.11) and 0.19 (Python 3.12). A difference is asked
for where it lies, by what the installed release has, never by its number; the tests know the number
of each and fail when it is no difference any more.

megatron-core is written for CUDA. Its distributed data parallelism, distributed optimizer,
pipeline schedules and token dispatchers are plain torch over ``torch.distributed``, so they run
on CPU over gloo once the few places that name CUDA are redirected. That is what this file does:
it changes no algorithm, and it is called before anything else imports ``megatron``.

Three kinds of redirection, each listed in a table below with its reason, and the differences at
the end of the file, are covered by ``tests/parallel/test_megatron_compat.py``, whose tests fail
when upstream no longer needs them:

* ``torch.cuda`` functions (streams, events, RNG state, the current device) get CPU meanings;
* string constants in a handful of functions (``device="cuda"``, ``"torch.cuda.FloatTensor"``)
  are replaced in their code objects, which costs nothing at run time;
* a few small functions are replaced whole, and ``Tensor.cuda`` leaves tensors where they are.

On a CUDA machine only :func:`patch_missing_transformer_engine` and :func:`fuse_gradient_norm` (when
Transformer Engine is absent) and :func:`patch_checkpoint_results` act.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import queue
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mone_megatron.kernels import rotary_cpu
from mone_megatron.megatron_release import check_megatron_release, megatron_release
from mone_megatron.parallel.gloo import share_gloo_devices

# Constants of CUDA-only code and what they mean on a CPU.
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_PREDICTION_LAYER = re.compile(r"^(mtp\.layers\.\d+\.)mtp_model_layer\.")

# The file in which older releases keep what is no tensor in a checkpoint.
COMMON = "common.pt"

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


class _Stream:
    """Has a CUDA stream's interface, on a device whose work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Does nothing: CPU work is in order, so there is nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Does nothing: CPU work is in order, so there is nothing to wait for."""

    def record_event(self, event: _Event | None = None) -> _Event:
        """Returns an event that has already happened."""
        return event or _Event()

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""


class _Event:
    """Has a CUDA event's interface, on a device whose work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Does nothing: there is nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Does nothing: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""


# Elements of a gradient whose squares are added up at once.
_BLOCK = 2**15
_THE_STREAM = _Stream()
_CPU = torch.device("cpu")


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _nothing() -> Callable[..., None]:
    """Returns a new function that does nothing: torch._dynamo refuses one function twice."""
    return lambda *args, **kwargs: None


# (module, what its line begins with, since when or until when): notices that are harmless here, and
# what for. They would stand on the terminal once a process, a layer or a save.
NOTICES: tuple[tuple[str, str, str], ...] = (
    # Modules of ours get default process groups, which are the ones we want.
    ("transformer.transformer_layer", "Unknown MLP type", "0.16"),
    # A spec is taken for what it is.
    ("transformer.transformer_layer", "Rewrapping ModuleSpec", "0.19"),
    # In favour of HybridModel, which is another class of the same layers.
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED", "0.19"),
    # It is computed inside, as before.
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout", "0.19"),
    # Checkpoints of 0.16 are read through it.
    ("dist_checkpointing.strategies.common", "load_common is deprecated", "0.19"),
    # Its writer is not used, only what it prepares.
    ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated", "0.19"),
)

# torch.cuda name -> CPU meaning. megatron-core calls these in every forward and backward pass.
CUDA_REDIRECTIONS: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _stream_context,
    "current_stream": lambda device=None: _THE_STREAM,
    "default_stream": lambda device=None: _THE_STREAM,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
}


def _stay(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Stands in for ``Tensor.cuda`` and returns the tensor as it is.

    megatron-core moves embeddings that are tied over pipeline stages by it when it builds them.
    """
    return tensor


def _rewrite_code(code: types.CodeType) -> tuple[types.CodeType, int]:
    """Returns ``code`` with its CUDA constants replaced, nested functions' too, and how many."""
    changed = 0
    constants = []
    for constant in code.co_consts:
        new: Any = constant
        if isinstance(constant, types.CodeType):
            new, count = _rewrite_code(constant)
            changed += count
        elif isinstance(constant, str) and constant in _CONSTANTS:
            new = _CONSTANTS[constant]
            changed += 1
        elif isinstance(constant, tuple) and any(item in _CONSTANTS for item in constant):
            new = tuple(_CONSTANTS.get(item, item) for item in constant)
            changed += 1
        constants.append(new)
    return (code.replace(co_consts=tuple(constants)), changed) if changed else (code, 0)


def _resolve(module: str, qualified_name: str) -> types.FunctionType:
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
    function = _resolve(module, qualified_name)
    function.__code__, changed = _rewrite_code(function.__code__)
    return changed


def _cpu_get_rng_state(
    device: object = None, clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _cpu_set_rng_state(
    new_state: torch.Tensor, device: object = None, graph_safe: bool = False
) -> None:
    torch.set_rng_state(new_state)


def _to_cpu_always(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``maybe_move_tensor_to_cpu`` for the CPU: it converts whatever it is asked to.

    The original converts only what was on a GPU; the split sizes that all-to-all needs must become
    numpy on CPU, too.
    """

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return tensor

    return maybe_move_tensor_to_cpu


def _l2_norm(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], *args: object
) -> tuple[torch.Tensor, None]:
    """Computes ``local_multi_tensor_l2_norm`` on CPU: the norm of all tensors, ``[1]`` fp32.

    The library's returns it on CUDA, and adds up squares in fp32 over whole gradient buffers,
    whose rounding alone (1e-5 relative) hides what layouts could differ by.
    """
    squares = sum(_sum_of_squares(tensor) for tensors in tensor_lists for tensor in tensors)
    return torch.tensor([squares], dtype=torch.float64).sqrt().float(), None


def _sum_of_squares(tensor: torch.Tensor) -> float:
    """Returns the sum of squares in fp64, of blocks that stay in a core's cache."""
    flat = tensor.detach().reshape(-1)
    wide = torch.empty(min(_BLOCK, max(len(flat), 1)), dtype=torch.float64)
    total = 0.0
    for block in flat.split(_BLOCK):
        part = wide[: len(block)].copy_(block)
        total += float(torch.dot(part, part))
    return total


def _gather_uneven(part: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Returns all ranks' rows in rank order, padded on the way: gloo gathers equal parts only."""
    largest = max(sizes)
    padded = part.new_zeros(largest, *part.shape[1:])
    padded[: part.shape[0]] = part
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_uneven(
    whole: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]
) -> torch.Tensor:
    """Returns this rank's rows of the sum; gloo's reduce_scatter takes equal parts only."""
    summed = whole.clone()
    dist.all_reduce(summed, group=group)
    return summed.split(sizes)[group.rank()].clone()


def _with_uneven_splits(even: Callable[..., Any], uneven: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``even``, with ``uneven`` in its place where ranks hold different numbers of rows.

    ``even`` is ``mappings._gather_along_first_dim`` or its counterpart. With expert tensor
    parallelism ranks hold different numbers of tokens, which gloo's collectives refuse.
    """

    @functools.wraps(even)
    def along_first_dim(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if split_sizes is None or group.size() == 1:
            return even(tensor, group, split_sizes, use_global_buffer)
        return uneven(tensor, group, [int(size) for size in split_sizes])

    return along_first_dim


def _with_lean_rotation(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns ``rope_utils._apply_rotary_pos_emb_bshd``, with ours where all heads are rotated."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        t: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        scale = kwargs.get("mscale", 1.0)
        other = args or any(value for name, value in kwargs.items() if name != "mscale")
        if other or scale != 1.0 or not rotary_cpu.supports(t, freqs):
            return original(t, freqs, *args, **kwargs)
        return rotary_cpu.rotate(t, freqs)

    return apply_rotary_pos_emb


def _angles_of_context_rank(
    pos_emb: torch.Tensor, seq_dim: int, cp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Stands in for ``rope_utils.get_pos_emb_on_this_cp_rank``, which needs pinned memory."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    mine = cp_group.rank(), 2 * cp_group.size() - cp_group.rank() - 1
    return torch.cat([chunks[number] for number in mine], dim=seq_dim)


def patch_missing_transformer_engine() -> None:
    """Makes megatron-core work without Transformer Engine, on any device.

    ``moe_utils.router_gating_linear`` reads ``te_general_gemm``, which exists only when
    Transformer Engine was imported: a NameError in every router until it is None.

    ``multi_latent_attention`` believes Transformer Engine is there, because its classes can be
    imported as mocks when it is not, and asks whether a layer is an instance of one: a TypeError.
    """
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    # The whole linear layer that latent attention accepts: 0.19 binds it only beside Transformer
    # Engine, and takes every other for an unknown one.
    if vars(multi_latent_attention).get("Linear", Linear) is None:
        multi_latent_attention.Linear = Linear


def patch_checkpoint_results() -> None:
    """Keeps the results of writing a checkpoint in this process, on any device.

    ``filesystem_async`` starts a server process, with torch imported in it, for each rank's first
    save, to take results from writers that it does not own. Ours report to the process itself.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


def _says_something_else(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def _fused_l2_norm(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], *args: object
) -> tuple[torch.Tensor, None]:
    """Computes ``local_multi_tensor_l2_norm`` without waiting: the norm of all, ``[1]`` fp32."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    return torch.nn.utils.get_total_norm(tensors).float().view(1), None


def _fused_scale(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Does ``local_multi_tensor_scale`` at once, and in place where source and target are one."""
    sources, targets = tensor_lists
    for source, target in zip(sources, targets, strict=True):
        if source is not target:
            target.copy_(source)
    torch._foreach_mul_(targets, scale)


def fuse_gradient_norm() -> None:
    """Lets fused kernels measure and clip gradients, on CUDA.

    Without Transformer Engine or apex megatron-core takes the norm of one gradient after another to
    the host, which waits for each, and clips each by a product and a copy.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _fused_l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _fused_scale


# Packages that megatron-core imports for what a run of ours never asks of it: its timers and its
# inference engine would write to W&B. Importing it takes as long as a fifth of megatron-core.
DEFERRED = ("wandb",)
_deferred = threading.Lock()


class _ImportedWhenUsed(types.ModuleType):
    """Stands for an installed package until an attribute of it is read, and then imports it."""

    def __getattr__(self, name: str) -> Any:
        with _deferred:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer(package: str) -> None:
    """Lets an installed package that is not imported yet be imported when it is used."""
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        return
    module = _ImportedWhenUsed(package)
    # What Python reads of a module that is imported again, and those who look through all modules.
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    sys.modules[package] = module


def import_megatron(*, compile_fused: bool) -> None:
    """Imports megatron-core, quietly.

    Args:
        compile_fused: whether megatron-core's ``jit_fuser`` is torch.compile. It decorates small
            elementwise functions at import; on CPU compiling them takes minutes and gains
            nothing, so there it becomes the identity.

    Raises:
        ValueError: for a release that cannot train right.
    """
    check_megatron_release()
    compiler = torch.compile
    with warnings.catch_warnings():
        # "Transformer Engine/Apex not installed": what was chosen is printed by the run itself.
        warnings.simplefilter("ignore")
        try:
            if not compile_fused:
                torch.compile = lambda function, *args, **kwargs: function  # type: ignore
            for package in DEFERRED:
                defer(package)
            import megatron.core
            import megatron.core.models.gpt
            import megatron.core.optimizer  # noqa: F401
        finally:
            torch.compile = compiler
    patch_missing_transformer_engine()
    patch_checkpoint_results()
    # Harmless, from inside the library, and once per process on the terminal otherwise.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS")
    warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`save_state_dict` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*reduce_scatter_tensor.*deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*deprecated", FutureWarning)
    # 0.19 imports this class of another kind of model where it makes any optimizer.
    warnings.filterwarnings("ignore", "MimoModelConfig is experimental")
    # Reading the common state of a checkpoint (0.19), by one rank for itself, which is meant.
    warnings.filterwarnings("ignore", "The argument order of load has been changed")
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    for module, start, _ in NOTICES:
        logging.getLogger(f"megatron.core.{module}").addFilter(
            functools.partial(_says_something_else, start)
        )


def install_cpu_backend() -> None:
    """Redirects megatron-core's uses of CUDA to the CPU. It may be called again.

    Raises:
        RuntimeError: when megatron-core was imported before this call by somebody else, since
            some of its modules bind names of ``torch.cuda`` at import.
    """
    if torch.cuda.current_device is CUDA_REDIRECTIONS["current_device"]:
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("install_cpu_backend() must be called before megatron.core is imported")
    for name, replacement in CUDA_REDIRECTIONS.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = _stay  # type: ignore[method-assign, assignment]
    share_gloo_devices()
    import_megatron(compile_fused=False)

    from megatron.core.models.common.embeddings import (
        rope_utils,
        rotary_pos_embedding,
        yarn_rotary_pos_embedding,
    )
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # The RNG tracker reads and writes the CUDA generator through these two helpers.
    random._get_cuda_rng_state = _cpu_get_rng_state
    random._set_cuda_rng_state = _cpu_set_rng_state
    # The tracker warns when the CPU generator moves inside a fork; here that generator is the
    # one being forked.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    move = _to_cpu_always(moe_utils.maybe_move_tensor_to_cpu)
    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move
    clip_grads.l2_norm_impl = _l2_norm
    # The library's makes a scaled copy and copies it back.
    clip_grads.multi_tensor_scale_impl = _fused_scale
    rope_utils._apply_rotary_pos_emb_bshd = _with_lean_rotation(
        rope_utils._apply_rotary_pos_emb_bshd
    )
    mappings._gather_along_first_dim = _with_uneven_splits(
        mappings._gather_along_first_dim, _gather_uneven
    )
    mappings._reduce_scatter_along_first_dim = _with_uneven_splits(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_uneven
    )
    for rope in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        rope.get_pos_emb_on_this_cp_rank = _angles_of_context_rank
    for module, function, _ in CONSTANT_REWRITES:
        rewrite_constants(module, function)


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


# Differences between releases ----------


def forget_layer_losses() -> None:
    """Drops megatron-core's auxiliary losses, and the number of layers that they were made for.

    Until 0.17 ``moe_utils`` hands out the one dictionary of them; from 0.18 on it hands out a copy,
    and clearing that does nothing.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def layer_losses() -> dict[str, torch.Tensor]:
    """Returns megatron-core's auxiliary losses of this rank by name: ``[layers]``, no copies."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        metrics = moe_utils.get_moe_metrics_tracker().metrics
        return {name: entry.values for name, entry in metrics.items()}
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in tracker.items()}


def zero_layer_losses() -> None:
    """Sets megatron-core's auxiliary losses of this rank to zero, in place."""
    for values in layer_losses().values():
        values.zero_()


def count_rows_sent(dispatcher: Any) -> None:
    """Has an alltoall dispatcher count the rows that it sends, of a router that varies them.

    It takes them for ``moe_router_topk`` a token: 0.19 then leaves rows out, or sends some of no
    token's choice. Counting waits for a GPU.
    """
    preprocess = dispatcher.preprocess

    def counting(routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert: torch.Tensor = preprocess(routing_map)
        dispatcher.num_out_tokens = int(routing_map.sum())
        return tokens_per_expert

    dispatcher.preprocess = counting


def take_prediction_losses(depth: int) -> torch.Tensor:
    """Returns the losses of multi-token prediction of this rank, and sets them to zero.

    They are sums over the microbatches since the last call, of their means over tokens.

    Args:
        depth: how many there are on the ranks that have any.

    Returns:
        ``[depth]`` fp32; zeros on the ranks of other pipeline stages.
    """
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    # Called otherwise from 0.17 on, which also counts tokens.
    kept = tracker.get("loss_values", tracker.get("values"))
    if kept is None:
        return torch.zeros(depth)
    taken: torch.Tensor = kept.float().clone()
    kept.zero_()
    return taken


def forget_prediction_losses() -> None:
    """Drops the losses of multi-token prediction of another model."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()


def stored_name(name: str) -> str:
    """Returns the name under which checkpoints hold a parameter, of its name in this release.

    0.19 calls the transformer layer of multi-token prediction otherwise than 0.16, and saves it by
    the older name.
    """
    return _PREDICTION_LAYER.sub(r"\1transformer_layer.", name)


def part_of_context_rank(
    batch: dict[str, Any], group: dist.ProcessGroup
) -> dict[str, torch.Tensor]:
    """Returns this rank's tokens of a batch: two chunks of each sequence, one from each end.

    0.19 also cuts batches in two other ways, has to be told which, and without a group takes all
    ranks.

    Args:
        batch: tensors ``[B, S, ...]`` by name.
        group: the context-parallel ranks.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    part: Callable[..., dict[str, torch.Tensor]] = get_batch_on_this_cp_rank
    if "is_hybrid_cp" in inspect.signature(part).parameters:
        part = functools.partial(part, is_hybrid_cp=False)
    return part(batch, cp_group=group)


def own_writer() -> dict[str, str]:
    """Returns the arguments with which ``dist_checkpointing.save`` leaves the writing to us.

    From 0.17 on it saves through nvidia-resiliency-ext unless it is told to prepare what its own
    writer would write, which :mod:`mone_megatron.train.resume.writing` takes over.
    """
    from megatron.core import dist_checkpointing

    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        return {"async_strategy": "mcore"}
    return {}


def unreadable_form(checkpoint: Path) -> str | None:
    """Returns why the installed megatron-core cannot read a checkpoint; None where it can.

    0.19 keeps what is no tensor as one more object in the shards; older releases ask for a file
    ``common.pt``, which newer ones still read.
    """
    from megatron.core.dist_checkpointing import serialization

    if hasattr(serialization, "_legacy_common_state_exists") or (checkpoint / COMMON).exists():
        return None
    installed = ".".join(map(str, megatron_release()))
    return (
        f"a newer megatron-core than the installed {installed} wrote it (it has no {COMMON}); go "
        "on with the release that its manifest.json names (0.19 needs Python 3.12)"
    )


@functools.cache
def self_attention() -> type:
    """Returns megatron-core's self-attention, which takes the norms of queries and keys of a spec.

    From 0.18 on it refuses them without ``qk_layernorm=True``; but that adds the gradients of both
    norms up over tensor-parallel ranks, which is wrong where their weights are split over them.
    """
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    class SpecifiedSelfAttention(SelfAttention):
        """Is megatron-core's, with the norms of queries and keys that its spec names."""

        def __init__(
            self, config: TransformerConfig, submodules: SelfAttentionSubmodules, **more: Any
        ) -> None:
            norms = submodules.q_layernorm, submodules.k_layernorm
            if config.qk_layernorm or norms == (IdentityOp, IdentityOp):
                super().__init__(config, submodules, **more)
                return
            plain = replace(submodules, q_layernorm=IdentityOp, k_layernorm=IdentityOp)
            super().__init__(config, plain, **more)
            self.q_layernorm, self.k_layernorm = (
                build_module(
                    norm,
                    hidden_size=self.hidden_size_per_attention_head,
                    config=self.config,
                    eps=self.config.layernorm_epsilon,
                )
                for norm in norms
            )

    return SpecifiedSelfAttention


@functools.cache
def latent_attention() -> type:
    """Returns megatron-core's multi-latent attention, with the modules that its spec names.

    From 0.18 on it takes others in place of what stands there, which need Transformer Engine or
    norm queries that have no latent; and without ``qk_layernorm`` it refuses norms.
    """
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import (
        MLASelfAttention,
        MLASelfAttentionSubmodules,
    )

    class SpecifiedLatentAttention(MLASelfAttention):
        """Is megatron-core's, with the projections and norms that its spec names."""

        def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
            names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
            norms = ("q_layernorm", "kv_layernorm")
            return {name: getattr(submodules, name) or IdentityOp for name in (*names, *norms)}

    return SpecifiedLatentAttention
