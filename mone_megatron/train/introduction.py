"""What a run says before its first step: what was chosen, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mone_megatron.config.megatron import graphs_attention
from mone_megatron.config.schema import Config
from mone_megatron.counting import counted
from mone_megatron.data.prepare import PreparedData
from mone_megatron.kernels import ops
from mone_megatron.kernels.te_grouped import have_transformer_engine
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.parallel import cuda_graphs, fusions
from mone_megatron.planning.activations import Numerics, keeps_attention_weights
from mone_megatron.planning.budget import usage_is_fixed
from mone_megatron.planning.parameters import ParameterCount
from mone_megatron.train.session import Session


def say(message: str) -> None:
    """Tells the user, once, from rank 0."""
    if dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)


def introduce(session: Session, data: PreparedData, parameters: ParameterCount) -> None:
    """Says what was chosen, and why, in a few lines."""
    config, layout, device = session.config, session.layout, session.device
    parallel = config.parallel
    modules = (
        "Transformer Engine" if device.kind == "cuda" and have_transformer_engine() else "torch"
    )
    planned = "" if usage_is_fixed(config) else "planned to be "
    say(
        f"{config.run.name}: {parameters.total:,} parameters, "
        f"{parameters.activated_gate_counted:,} {planned}activated a "
        f"token (gate counted; {parameters.activated_neurons_only:,} by neurons only)"
    )
    say(
        f"on {device.hardware}; {device.dtype}, {modules} modules, "
        f"{ops.describe(device.torch_device)}; "
        f"TP{parallel.tensor} PP{parallel.pipeline} CP{parallel.context} EP{parallel.expert} "
        f"ETP{parallel.expert_tensor} DP{layout.data}, "
        f"{counted(layout.num_microbatches, 'microbatch')} a step"
    )
    if device.kind == "cuda":
        say(fusions.describe(config))
    if graphs_attention(config.megatron):
        say(cuda_graphs.describe(config))
    for line in kept_weights(config, device.kind, device.dtype):
        say(line)
    say(f"data: {data.tokens:,} tokens, vocabulary {data.vocab_size:,}, {data.beginning}")
    for line in (*of_the_rule(config), *not_causal(config)):
        say(line)


def kept_weights(config: Config, kind: str, dtype: torch.dtype) -> Iterator[str]:
    """Yields a line where attention keeps its weights, which takes memory."""
    # On a CPU attention is ours.
    if kind == "cpu" and keeps_attention_weights(config, Numerics("cpu", bytes=dtype.itemsize)):
        yield (
            f"attention keeps its weights for the backward pass, which is faster for sequences of "
            f"{config.train.seq_length} tokens on a CPU (docs/performance.md)"
        )


def of_the_rule(config: Config) -> Iterator[str]:
    """Yields a line for what a selection rule does otherwise than the usual one."""
    if not config.mone.enabled:
        return
    rule, score = RULES[config.mone.rule], config.mone.score
    if not rule.top_k:
        yield f"mone.rule={rule.name}: the kernels are given its mask, which torch computes"
    if rule.score not in (None, score):
        yield (
            f"mone.rule={rule.name} is written for mone.score={rule.score}; with {score} the "
            "density may be far from mone.keep_ratio (mone/density tells it)"
        )
    if rule.reads_batch:
        yield (
            f"mone.rule={rule.name} ranks the tokens of a microbatch together in training; "
            "evaluation is causal"
        )


def not_causal(config: Config) -> Iterator[str]:
    """Yields a line for each chosen method that lets a token see others of its batch.

    Its training loss, and its loss in evaluation, use what a model that writes a text cannot know.
    """
    rule, router = RULES[config.mone.rule], ROUTERS[config.model.router.kind]
    if config.mone.enabled and not rule.causal:
        yield (
            f"mone.rule={rule.name} is not causal: which neurons a token keeps depends on other "
            "tokens, later ones too; losses tell of a model that has seen them"
        )
    if config.model.num_experts and not router.causal:
        yield (
            f"model.router.kind={router.name} is not causal: which experts a token goes to depends "
            "on other tokens, later ones too; losses tell of a model that has seen them"
        )
