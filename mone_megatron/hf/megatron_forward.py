"""Runs a checkpoint's Megatron model in one process on the CPU, to check conversions against.

It is not for training: no optimizer, no data parallelism, weights straight from the checkpoint.

Shape suffixes: B sequences, S positions, V vocabulary, T rows of an expert, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mone_megatron.config.schema import Config, DeviceConfig, ParallelConfig
from mone_megatron.hf.source import Source
from mone_megatron.hf.verify import LayerChoices, product_key_choices
from mone_megatron.methods.rule import STATE_PREFIX
from mone_megatron.parallel.device import open_device, open_process_group
from mone_megatron.parallel.world import World

_PATIENCE_SECONDS = 600


class MegatronForward:
    """Computes a checkpoint's logits and choices with the training model, in fp32."""

    def __init__(self, model: torch.nn.Module, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Returns logits of tokens ``[B, S]``, fp32 ``[B, S, V]`` over the true vocabulary."""
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        logits: Tensor = self._model(tokens_BS, positions_BS, attention_mask=None)
        return logits.float()[..., : self._vocab_size]

    def logits_and_choices(self, tokens_BS: Tensor) -> tuple[Tensor, list[LayerChoices]]:
        """Returns :meth:`logits`, and each layer's choices, where it has experts."""
        from megatron.core.transformer.moe.router import TopKRouter

        from mone_megatron.mone.experts import GroupedExperts
        from mone_megatron.mone.product_key import ProductKeyExperts

        sequences, length = tokens_BS.shape
        found: list[LayerChoices] = []
        handles = []

        def saw_router(module: torch.nn.Module, inputs: object, output: tuple) -> None:
            # megatron-core's tokens are in the order [S, B].
            routing = output[1].view(length, sequences, -1).transpose(0, 1)
            found.append(LayerChoices(routing.reshape(sequences * length, -1).bool()))

        def saw_mask(module: torch.nn.Module, inputs: object, mask_TF: Tensor) -> None:
            # Rows are sorted by expert, then by megatron-core's order of tokens.
            order = torch.arange(sequences * length).view(sequences, length).T.flatten()
            choices = found[-1]
            rows = choices.experts[order].T.nonzero()
            choices.masks = {
                (int(order[token]), int(expert)): mask
                for (expert, token), mask in zip(rows.tolist(), mask_TF, strict=True)
            }

        def saw_product_keys(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(product_key_choices(module, inputs[0].transpose(0, 1).flatten(0, 1)))

        for module in self._model.modules():
            if isinstance(module, ProductKeyExperts):
                handles.append(module.register_forward_pre_hook(saw_product_keys))
            elif isinstance(module, TopKRouter):
                handles.append(module.register_forward_hook(saw_router))
            elif isinstance(module, GroupedExperts) and module.neuron_gate.selector is not None:
                handles.append(module.neuron_gate.selector.register_forward_hook(saw_mask))
        try:
            return self.logits(tokens_BS), found
        finally:
            for handle in handles:
                handle.remove()


def _alone(config: Config) -> Config:
    """Returns the configuration of the same model in one process in fp32.

    It computes with the threads that torch has, which ``OMP_NUM_THREADS`` chooses.
    """
    device = DeviceConfig(kind="cpu", dtype="fp32", threads=torch.get_num_threads())
    megatron = config.megatron.of_the_model()
    return replace(config, parallel=ParallelConfig(), device=device, megatron=megatron)


@contextmanager
def megatron_forward(source: Source, *, dtype: torch.dtype | None) -> Iterator[MegatronForward]:
    """Yields a checkpoint's model with its weights; closes process groups at the end.

    It computes in fp32 with the weights that an export in ``dtype`` holds: rounded to it, or as
    they are stored (None).

    Collectives are those of a group of one. Within it, this process has megatron-core's CPU
    backend installed, for good (:mod:`mone_megatron.parallel.megatron_compat`).

    Raises:
        ValueError: a weight is missing.
    """
    config = _alone(source.config)
    world = World()
    device = open_device(config.device, world)
    # Only now: megatron-core binds names of torch.cuda at import.
    from mone_megatron.model.builder import build_gpt
    from mone_megatron.model.initialize import global_name
    from mone_megatron.model.transformer import transformer_config
    from mone_megatron.mone.layer import MicrobatchSources
    from mone_megatron.parallel.groups import close_groups, open_groups

    open_process_group(device, world, _PATIENCE_SECONDS)
    try:
        open_groups(config.parallel, config.train, timeout_seconds=_PATIENCE_SECONDS)
        model = build_gpt(
            config,
            transformer_config(config, dtype=torch.float32, on_cpu=True, sequence_parallel=False),
            vocab_size=source.vocab_size,
            sources=MicrobatchSources((0,)),
            on_cpu=True,
            vp_stage=None,
        )
        with torch.no_grad():
            for local_name, tensor in [*model.named_parameters(), *_trained_buffers(model)]:
                tensor.copy_(source.read(global_name(model, local_name), dtype=dtype))
        yield MegatronForward(model.eval(), source.vocab_size)
    finally:
        close_groups()


def _trained_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers that training moves: expert biases, and the state of selection rules."""
    for name, buffer in model.named_buffers():
        if name.endswith("router.expert_bias") or f".selector.{STATE_PREFIX}" in name:
            yield name, buffer
