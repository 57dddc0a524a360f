"""Builds the model chunks of this rank, wrapped for data parallelism."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from mone_megatron.config.megatron import with_given
from mone_megatron.config.schema import Config
from mone_megatron.model.gpt import LanguageModel
from mone_megatron.model.initialize import initialize_weights
from mone_megatron.model.replicated import mark_replicated
from mone_megatron.model.specs import (
    decoder_spec,
    layer_specs,
    prediction_spec,
    sparsity_settings,
)
from mone_megatron.model.transformer import moe_layer_pattern, transformer_config
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.layer import MicrobatchSources, MoNELayer
from mone_megatron.mone.neurons import NeuronGate
from mone_megatron.mone.routers import AssigningRouter, SteeredRouter
from mone_megatron.parallel.device import Device
from mone_megatron.parallel.groups import ExpertSources
from mone_megatron.parallel.megatron_compat.token_exchange import count_rows_sent
from mone_megatron.parallel.megatron_compat.weight_gradients import add_weight_gradients_in_place


def build_gpt(
    config: Config,
    transformer: TransformerConfig,
    *,
    vocab_size: int,
    sources: MicrobatchSources,
    on_cpu: bool,
    vp_stage: int | None,
) -> GPTModel:
    """Returns one model chunk with its initial weights, unwrapped."""
    stage = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    first, last = (is_edge(ignore_virtual=False, vp_stage=vp_stage) for is_edge in stage)
    layers = layer_specs(
        config.model,
        config.mone,
        sources=sources,
        on_cpu=on_cpu,
        own_attention=config.data.reset_attention,
        sparsity=sparsity_settings(config),
    )
    model = LanguageModel(
        true_vocab_size=vocab_size,
        config=transformer,
        transformer_layer_spec=decoder_spec(
            layers, transformer, layer_pattern=moe_layer_pattern(config), vp_stage=vp_stage
        ),
        mtp_block_spec=prediction_spec(layers, depth=config.model.mtp.depth, last=last),
        vocab_size=config.model.padded_vocab_size(vocab_size),
        max_sequence_length=config.train.seq_length,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        vp_stage=vp_stage,
    )
    mark_replicated(model)
    for module in model.modules():
        if (
            isinstance(module, MoNELayer)
            and isinstance(module.router, AssigningRouter)
            and type(module.token_dispatcher) is MoEAlltoAllTokenDispatcher
        ):
            count_rows_sent(module.token_dispatcher)
    if config.model.mtp.depth and last:
        _number_later_layers(model)
    initialize_weights(
        model, seed=config.train.seed, std=config.model.init_std, vocab_size=vocab_size
    )
    return model


def _number_later_layers(model: GPTModel) -> None:
    """Numbers the layers of multi-token prediction after the others, for what is told of layers.

    megatron-core 0.19 numbers them from 1.
    """
    for number, layer in enumerate(model.mtp.layers, start=model.config.num_layers + 1):
        for module in layer.modules():
            if isinstance(module, NeuronGate):
                module.layer_number = number
            elif isinstance(module, SteeredRouter):
                module.told_number = number


def build_model(
    config: Config,
    *,
    device: Device,
    vocab_size: int,
    sequence_parallel: bool,
    sources: ExpertSources,
) -> list[DistributedDataParallel]:
    """Returns this pipeline rank's chunks, on its device, wrapped for data parallelism.

    The wrapper is megatron-core's ``DistributedDataParallel``.

    Args:
        config: the validated configuration.
        device: opened; process groups are initialised.
        vocab_size: the tokenizer's number of entries, unpadded.
        sequence_parallel: as the validated layout has it.
        sources: from :func:`mone_megatron.parallel.groups.open_expert_sources`.
    """
    on_cpu = device.kind == "cpu"
    transformer = transformer_config(
        config, dtype=device.dtype, on_cpu=on_cpu, sequence_parallel=sequence_parallel
    )
    # Where nothing is balanced, nobody asks which microbatch a row is of.
    selecting = config.mone.enabled and "routed" in config.mone.apply_to
    unasked = not selecting and config.parallel.dispatcher == "flex"
    microbatches = MicrobatchSources(
        sources.microbatch_of_source,
        sources.shared_group,
        together=unasked or config.mone.balance.scope == "group",
    )
    parallel = config.parallel
    ddp_fields = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
        "overlap_param_gather": parallel.overlap_param_gather,
        "use_distributed_optimizer": parallel.distributed_optimizer,
        "check_for_nan_in_grad": False,  # the trainer checks the gradient norm and the loss
    }
    ddp_config = DistributedDataParallelConfig(**with_given("ddp", ddp_fields, config.megatron.ddp))
    chunks: list[DistributedDataParallel] = []
    for chunk in range(parallel.virtual_pipeline):
        model: torch.nn.Module = build_gpt(
            config,
            transformer,
            vocab_size=vocab_size,
            sources=microbatches,
            on_cpu=on_cpu,
            vp_stage=chunk if parallel.virtual_pipeline > 1 else None,
        )
        model.to(device.torch_device)
        if transformer.bf16:
            model = Float16Module(transformer, model)
        chunks.append(
            DistributedDataParallel(
                config=transformer,
                ddp_config=ddp_config,
                module=model,
                disable_bucketing=chunk > 0,
            )
        )
        # megatron-core's overlap waits for autograd's own gradients. Transformer Engine's products
        # give it some to see, which are not added.
        by_engine = config.device.grouped_gemm == "transformer_engine"
        in_products = on_cpu and not ddp_config.overlap_grad_reduce
        if by_engine or in_products:
            _add_gradients_in_place(chunks[-1])
        if in_products:
            add_weight_gradients_in_place(chunks[-1])
    return chunks


def _add_gradients_in_place(chunk: DistributedDataParallel) -> None:
    """Lets the gradients of experts go straight to the buffer where microbatches are added up."""
    for module in chunk.modules():
        if isinstance(module, GroupedExperts):
            for parameter in module.parameters(recurse=False):
                parameter.adds_to_main_grad = hasattr(parameter, "main_grad")
