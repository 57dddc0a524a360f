"""The optimizer within megatron-core's machinery, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mone_megatron.config.megatron import with_given
from mone_megatron.config.schema import Config, OptimConfig
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.parallel.device import Device
from mone_megatron.train.resume.saved_state import inner_parts, keep_moments, parameter_states

# megatron-core's mark of parameters that are tables of tokens.
_TABLE = "is_embedding_or_output_parameter"
_DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_optimizer(
    config: Config, device: Device, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Builds megatron-core's optimizer: no decay of norms and biases, gradients clipped by norm.

    Args:
        config: validated. Adam is built first whatever ``optim.name`` is, since megatron-core
            builds its groups with it; another optimizer then takes its place over the same groups.
        device: fp32 or bf16 parameters; bf16 ones get fp32 masters.
        chunks: from :func:`mone_megatron.model.builder.build_model`.
    """
    optim = config.optim
    fields = dict(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        bf16=device.dtype is torch.bfloat16,
        params_dtype=device.dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        # megatron-core computes the norm only when it clips; infinity clips nothing.
        clip_grad=optim.clip_grad or math.inf,
    )
    optimizer_config = OptimizerConfig(**with_given("optimizer", fields, config.megatron.optimizer))
    optimizer = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )
    method = OPTIMIZERS[optim.name]
    for part in inner_parts(optimizer):
        if method.make is not None:
            part.optimizer = _in_place_of(part.optimizer, method.make, optim)
        keep_moments(part.optimizer, method)
        if method.make is None:
            _fuse_adam(part.optimizer)
    _mark_masters(optimizer)
    return optimizer


def _mark_masters(optimizer: MegatronOptimizer) -> None:
    """Marks the fp32 masters of embeddings as megatron-core marks those, which optimizers read."""
    for state in parameter_states(optimizer):
        if state.main is not None and hasattr(state.parameter, _TABLE):
            setattr(state.main, _TABLE, getattr(state.parameter, _TABLE))


def _in_place_of(
    adam: torch.optim.Optimizer,
    make: Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer],
    optim: OptimConfig,
) -> torch.optim.Optimizer:
    """Returns another optimizer over the groups of ``adam``.

    It is made over groups with stand-ins for their parameters, and given the groups then, as
    megatron-core does with Adam's own: what it optimizes may be slices of buffers, which torch's
    constructor refuses.
    """
    stand_ins = [
        {**group, "params": [torch.nn.Parameter(torch.empty(0))]} for group in adam.param_groups
    ]
    made = make(stand_ins, optim)
    for group, other in zip(adam.param_groups, made.param_groups, strict=True):
        # What it keeps in a group beside what there was.
        group.update({key: value for key, value in other.items() if key not in group})
    made.param_groups = adam.param_groups
    return made


def _fuse_adam(adam: torch.optim.Optimizer) -> None:
    """Has torch's own Adam pass over memory once for each parameter, instead of about ten times.

    On CUDA torch's default holds temporaries as large as the moments. Transformer Engine's and
    apex's are fused as they are.
    """
    if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in adam.param_groups:
        group["fused"] = True
        group["foreach"] = False


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Builds what sets the learning rate of a step, by ``scheduler.step(1)`` before the update.

    Linear warm-up reaches ``optim.lr`` at step ``warmup_steps``; the last step has ``min_lr``
    (except ``constant``). "wsd" decays linearly over the last ``decay_fraction`` of the steps.
    """
    optim, steps = config.optim, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=_DECAY_STYLES[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=max(1, round(optim.decay_fraction * steps)),
        lr_wsd_decay_style="linear",
    )
