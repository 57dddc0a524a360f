"""Chooses which of megatron-core's fused and overlapped forms a run uses, by what is installed.

Each is a setting of megatron-core that changes how something is computed, and not what. One line of
:data:`FUSIONS` says when it can be used; where it cannot, it says why, and a run tells that once
(:func:`describe`). On a CPU all are off. Those that need Transformer Engine or apex were not run
here (docs/gpu.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mone_megatron.config.schema import Config
from mone_megatron.kernels.te_grouped import have_transformer_engine
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.routers import ROUTERS

# Why something cannot be used; None when it can.
Reason = str | None


@dataclass(frozen=True)
class Fusion:
    """Describes one of megatron-core's fused or overlapped forms.

    Attributes:
        setting: the field of its TransformerConfig.
        words: what is fused or overlapped, for people.
        why_not: returns why a configuration cannot use it on this machine's GPUs.
        settable: whether ``megatron.transformer`` may set it instead.
    """

    setting: str
    words: str
    why_not: Callable[[Config], Reason]
    settable: bool = True


def _provided(module: str, *names: str) -> Callable[[Config], Reason]:
    """Returns a check for functions that megatron-core binds to None where they are missing."""

    def why_not(config: Config) -> Reason:
        if not have_transformer_engine():
            return "no Transformer Engine"
        found = importlib.import_module(f"megatron.core.{module}")
        missing = [name for name in names if getattr(found, name, None) is None]
        return f"Transformer Engine has no {missing[0]}" if missing else None

    return why_not


def _first(*checks: Callable[[Config], Reason]) -> Callable[[Config], Reason]:
    def why_not(config: Config) -> Reason:
        return next((why for check in checks if (why := check(config)) is not None), None)

    return why_not


def _experts(config: Config) -> Reason:
    return None if config.model.num_experts else "no experts"


def _gradient_kernel(config: Config) -> Reason:
    # The output layer is megatron-core's own on both, and knows no other way.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return "no fused_weight_gradient_mlp_cuda (apex)"
    return None


def _plain_rope(config: Config) -> Reason:
    if config.model.attention == "mla":
        return "megatron-core's for latent attention is experimental"
    return None


def _plain_router(config: Config) -> Reason:
    router = config.model.router
    if not ROUTERS[router.kind].stock:
        return f"model.router.kind={router.kind}"
    return None if router.dtype == "fp32" else f"model.router.dtype={router.dtype}"


def _equal_counts(config: Config) -> Reason:
    # Transformer Engine's was not seen to be right where tokens have different numbers of experts.
    router = config.model.router.kind
    return None if ROUTERS[router].fixed_count else f"model.router.kind={router}"


def _swiglu(config: Config) -> Reason:
    if not ACTIVATIONS[config.model.activation].fused_by_megatron:
        return f"model.activation={config.model.activation}"
    return None


def _shared_beside_routed(config: Config) -> Reason:
    if not config.model.num_experts or not config.model.shared_expert_ffn_hidden_size:
        return "no shared expert"
    if config.mone.enabled and "shared" in config.mone.apply_to:
        return "the shared expert selects neurons"
    if config.parallel.dispatcher != "alltoall":
        return f"parallel.dispatcher={config.parallel.dispatcher}"
    if config.parallel.expert * config.parallel.expert_tensor == 1:
        return "experts exchange no tokens"
    return None


_TE = "extensions.transformer_engine"
FUSIONS: tuple[Fusion, ...] = (
    Fusion("gradient_accumulation_fusion", "gradients of other weights", _gradient_kernel,
           settable=False),
    Fusion("apply_rope_fusion", "RoPE", _first(
        _plain_rope,
        _provided("models.common.embeddings.rope_utils", "fused_apply_rotary_pos_emb"),
    ), settable=False),
    Fusion("bias_activation_fusion", "SwiGLU of dense layers and shared experts", _swiglu,
           settable=False),
    Fusion("moe_permute_fusion", "permutation", _first(_experts, _equal_counts, _provided(
        _TE, "fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs", "fused_unpermute",
    ))),
    Fusion("moe_router_fusion", "router", _first(_experts, _plain_router, _provided(
        _TE, "fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
    ))),
    Fusion("moe_shared_expert_overlap", "shared expert beside the routed", _shared_beside_routed),
)  # fmt: skip


def reasons(config: Config, *, on_cpu: bool) -> dict[str, Reason]:
    """Returns why each of :data:`FUSIONS` is off, by its setting; None where it is on."""
    if on_cpu:
        return {fusion.setting: "on a CPU" for fusion in FUSIONS}
    return {fusion.setting: fusion.why_not(config) for fusion in FUSIONS}


def settings(config: Config, *, on_cpu: bool) -> tuple[dict[str, bool], dict[str, bool]]:
    """Returns the fields of megatron-core's TransformerConfig that switch them on and off.

    Returns:
        Those that this project decides, and defaults of those that ``megatron.transformer`` may
        set, without those that it does set. On a CPU the second are megatron-core's own defaults,
        and left out.
    """
    chosen = {name: why is None for name, why in reasons(config, on_cpu=on_cpu).items()}
    fixed = {one.setting: chosen[one.setting] for one in FUSIONS if not one.settable}
    given = config.megatron.transformer
    free = {
        one.setting: chosen[one.setting]
        for one in FUSIONS
        if one.settable and one.setting not in given and not on_cpu
    }
    return fixed, free


def describe(config: Config) -> str:
    """Returns in one line what is fused and overlapped on this machine's GPUs, and what is not."""
    given: Mapping[str, object] = config.megatron.transformer
    on, off = [], []
    for fusion in FUSIONS:
        why = fusion.why_not(config)
        if fusion.setting in given:
            why = None if given[fusion.setting] else f"megatron.transformer.{fusion.setting}=false"
        if why is None:
            on.append(fusion.words)
        else:
            off.append(f"{fusion.words} ({why})")
    parallel, products = config.parallel, config.device.grouped_gemm
    for words, setting, wanted in (
        (
            "gradients of experts",
            f"device.grouped_gemm={products}",
            products == "transformer_engine",
        ),
        (
            "gradient reduction",
            "parallel.overlap_grad_reduce=false",
            parallel.overlap_grad_reduce,
        ),
        (
            "parameter gathering",
            "parallel.overlap_param_gather=false",
            parallel.overlap_param_gather,
        ),
    ):
        if wanted:
            on.append(words)
        else:
            off.append(f"{words} ({setting})")
    return f"fused or overlapped: {', '.join(on) or 'nothing'}; not: {', '.join(off) or 'nothing'}"
