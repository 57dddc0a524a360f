"""Times texts from a whole model at batch 1: rows of kept neurons beside all rows.

It needs the ``hf`` extra.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mone_megatron.hf.decode_mone import MONE_SPARSE
from mone_megatron.hf.experts_mone import MONE, enable_mone, experts_modules
from mone_megatron.lab.benchmarks.layer import LayerShape
from mone_megatron.lab.benchmarks.measure import Spread, interleave, ratio

_PROMPT_TOKENS = 8
_DENSE = ("grouped_mm", "batched_mm")


@dataclass(frozen=True)
class GenerateCost:
    """Holds the cost of texts from one model at one keep ratio.

    Tokens a second count new tokens, the prompt's time included.
    """

    shape: dict[str, int]
    dtype: str
    keep_ratio: float
    new_tokens: int
    # Of the time of a text by the fastest dense way: experts, without router and shared experts.
    experts_share: float
    dense: str
    tokens_per_second: dict[str, Spread]
    speed_up: Spread
    speed_up_processor: Spread
    # What would be left if experts were as fast as the bytes they read allow.
    limit: float


def random_moe(shape: LayerShape, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Qwen3-MoE of these sizes with random weights and a small vocabulary."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=8192,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.neurons,
        intermediate_size=shape.neurons,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        num_hidden_layers=layers,
        num_attention_heads=max(1, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 256),
        head_dim=64,
        norm_topk_prob=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def measure_generate(
    shape: LayerShape,
    keep_ratio: float,
    *,
    layers: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> GenerateCost:
    """Times whole greedy texts through transformers' ``generate``, interleaved.

    Args:
        shape: of the experts; its tokens are not used.
        keep_ratio: of the neurons.
        layers: decoder layers.
        new_tokens: of a text.
        repeats: texts of each way.
        device: where.
        dtype: of the weights.
    """
    model = random_moe(shape, layers, dtype)
    nn.Module.to(model, device)
    enable_mone(model, keep_ratio=keep_ratio)
    # Ours lays its weights out anew; the others keep them as they are loaded.
    models = dict.fromkeys((*_DENSE, MONE), model) | {MONE_SPARSE: copy.deepcopy(model)}
    prompt = torch.arange(_PROMPT_TOKENS, device=device).unsqueeze(0)

    def text(experts: str) -> None:
        models[experts].set_experts_implementation(experts)
        generate: Any = models[experts].generate
        generate(
            prompt,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples = interleave({way: partial(text, way) for way in models}, repeats=repeats, warmup=1)
    clock = samples.clock
    dense = min(_DENSE, key=lambda way: Spread.of(clock[way]).median)
    share = _experts_share(model, partial(text, dense), device)
    per_second = {way: Spread.of([new_tokens / each for each in clock[way]]) for way in models}
    return GenerateCost(
        shape={
            "hidden": shape.hidden,
            "neurons": shape.neurons,
            "experts": shape.experts,
            "chosen": shape.chosen,
            "layers": layers,
        },
        dtype=str(dtype),
        keep_ratio=keep_ratio,
        new_tokens=new_tokens,
        experts_share=share,
        dense=dense,
        tokens_per_second=per_second,
        speed_up=ratio(clock, dense, MONE_SPARSE),
        speed_up_processor=ratio(samples.processor, dense, MONE_SPARSE),
        limit=1 / (1 - share + share * (1 + 2 * keep_ratio) / 3),
    )


def _experts_share(model: PreTrainedModel, text: Callable[[], None], device: torch.device) -> float:
    """Returns the experts' share of the time of one text."""
    seconds = [0.0]
    started = [0.0]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        wait()
        started[0] = time.perf_counter()

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        wait()
        seconds[0] += time.perf_counter() - started[0]

    handles = [
        handle
        for module in experts_modules(model)
        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        )
    ]
    begun = time.perf_counter()
    text()
    whole = time.perf_counter() - begun
    for handle in handles:
        handle.remove()
    return seconds[0] / whole
