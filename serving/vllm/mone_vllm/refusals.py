"""Says what of a model vLLM would compute otherwise than it was trained. Imports no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN

from mone_vllm.definition.methods.rules import RULES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse(config: Any, vllm_config: VllmConfig, *, graphs: bool) -> None:
    """Refuses what would be computed otherwise than the model was trained, or not at all.

    Args:
        config: the model's.
        vllm_config: vLLM's.
        graphs: whether steps are recorded in CUDA graphs.

    Raises:
        ValueError: naming all of it.
    """
    parallel = vllm_config.parallel_config
    rule = RULES[(config.mone or {}).get("rule", "topk")]
    refused = {
        "attention_type=mla: multi-latent attention is not written for vLLM": config.attention_type
        != "gqa",
        f"gate={getattr(config, 'gate', 'full')}: experts have one matrix for their gates": getattr(
            config, "gate", "full"
        )
        != "full",
        f"router_kind={config.router_kind}: tokens are sent by megatron-core's own router alone": (
            config.router_kind != "topk"
        ),
        "product_key: single-neuron experts are not written for vLLM": bool(
            getattr(config, "product_key", None)
        ),
        "rectified_up: dReLU is not written for vLLM": config.rectified_up,
        "quantization: quantised experts compute all neurons": vllm_config.quant_config is not None,
        "LoRA: adapters of experts compute all neurons": vllm_config.lora_config is not None,
        "--enable-eplb: experts that move between ranks are not followed": parallel.enable_eplb,
        # Whether an expert has learned its state is asked on the host.
        f"mone.rule={rule.name} in CUDA graphs: use --enforce-eager": graphs and bool(rule.state),
        f"hidden_act={config.hidden_act}: unknown to transformers": config.hidden_act not in ACT2FN,
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise ValueError(f"MoneForCausalLM in vLLM does not support {'; '.join(reasons)}")
