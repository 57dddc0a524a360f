"""Says which module stands where: megatron-core layer specs, by a BackendSpecProvider.

Without Transformer Engine: megatron-core's parallel linear layers, torch RMSNorm and
scaled_dot_product_attention. With it: its linear layers, norms and attention (not run here). The
routed experts are ours on both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mone_megatron.config.schema import Config, ModelConfig, MoNEConfig
from mone_megatron.kernels.product_keys import ProductKeySizes
from mone_megatron.kernels.te_grouped import have_transformer_engine
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.model.attention import SDPAttention
from mone_megatron.model.norm import AllHeadsRMSNorm, RMSNorm
from mone_megatron.model.self_attention import SelfAttention
from mone_megatron.mone.balance import NeuronBalance
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.layer import MicrobatchSources, MoNELayer
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert
from mone_megatron.mone.neurons import NeuronSettings
from mone_megatron.mone.product_key import ProductKeyExperts
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.mone.sparsity import Sparsity
from mone_megatron.parallel.megatron_compat.attention_modules import (
    latent_attention,
)


class TorchSpecProvider(LocalSpecProvider):
    """Provides modules that need nothing but torch, and train under every layout."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """Returns our RMSNorm, since megatron-core's refuses sequence parallelism."""
        return RMSNorm

    def linear(self) -> type:
        """Returns the class of linear layers that every tensor-parallel rank has whole."""
        return Linear

    def core_attention(self) -> type:
        """Returns our attention, since megatron-core's builds the whole score matrix."""
        return SDPAttention


def _transformer_engine_provider(*, own_attention: bool) -> BackendSpecProvider:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TransformerEngineSpecProvider(TESpecProvider):
        """Provides Transformer Engine's dense modules, unfused so that parameter names stay."""

        def fuse_layernorm_and_linear(self) -> bool:
            """Returns False: norm and linear layer stay apart, as without Transformer Engine."""
            return False

        def core_attention(self) -> type:
            """Returns Transformer Engine's attention, or ours where only ours can do it."""
            return SDPAttention if own_attention else super().core_attention()

    return TransformerEngineSpecProvider()


def spec_provider(*, on_cpu: bool, own_attention: bool = False) -> BackendSpecProvider:
    """Returns Transformer Engine's modules on a GPU where it is installed, otherwise torch's.

    Args:
        on_cpu: whether the model is on CPU.
        own_attention: attention is ours in any case (documents apart, which Transformer Engine
            takes in another form; not run here beside it).
    """
    if not on_cpu and have_transformer_engine():
        return _transformer_engine_provider(own_attention=own_attention)
    return TorchSpecProvider()


def neuron_settings(mone: MoNEConfig, target: str) -> NeuronSettings | None:
    """Returns the method's settings for one kind of MLP; None where it does not apply."""
    if not mone.enabled or target not in mone.apply_to:
        return None
    return NeuronSettings(
        NeuronSelection(mone.keep_ratio, mone.score, mone.rule, mone.rule_options),
        NeuronBalance(
            mone.balance.coeff, mone.balance.kind, mone.balance.weights, mone.balance.normalize
        ),
        mone.memory,
        mone.straight_through,
    )


def _dense_mlp(backend: BackendSpecProvider, mone: MoNEConfig) -> ModuleSpec:
    submodules = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    neurons = neuron_settings(mone, "dense")
    if neurons is None:
        return ModuleSpec(module=MLP, submodules=submodules)
    return ModuleSpec(module=NeuronMLP, submodules=submodules, params={"neurons": neurons})


def _product_key(model: ModelConfig) -> ModuleSpec:
    sizes = ProductKeySizes(**asdict(model.product_key))
    return ModuleSpec(module=ProductKeyExperts, params={"sizes": sizes})


def sparsity_settings(config: Config) -> Sparsity | None:
    """Returns the settings of the sparsity loss of routed experts; None where there is none."""
    model, train = config.model, config.train
    if SPARSITY_LOSSES[model.sparsity_loss].function is None:
        return None
    tokens = train.micro_batch_size * train.seq_length
    return Sparsity(model.sparsity_loss, model.sparsity_coeff, tokens)


def _router(model: ModelConfig) -> type:
    """Returns the router's class, which knows its method and its settings."""
    router = ROUTERS[model.router.kind]
    if router.stock:
        return router.module
    values = {"kind": router.name, "settings": model.router_settings}
    return type(router.module.__name__, (router.module,), values)


def _moe_mlp(
    backend: BackendSpecProvider,
    model: ModelConfig,
    mone: MoNEConfig,
    sources: MicrobatchSources,
    sparsity: Sparsity | None,
) -> ModuleSpec:
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    routed, shared = (neuron_settings(mone, target) for target in ("routed", "shared"))
    shared_expert = (
        ModuleSpec(module=SharedExpertMLP, submodules=linears)
        if shared is None
        else ModuleSpec(module=NeuronSharedExpert, submodules=linears, params={"neurons": shared})
    )
    return ModuleSpec(
        module=MoNELayer,
        params={"sources": sources},
        submodules=MoESubmodules(
            router=_router(model),
            # megatron-core's need grouped_gemm or Transformer Engine, and select no neurons.
            experts=ModuleSpec(
                module=GroupedExperts,
                params={
                    "neurons": routed,
                    "sparsity": sparsity,
                    "gate": model.gate,
                    "gate_rank": model.gate_size.rank,
                },
            ),
            shared_experts=shared_expert,
        ),
    )


def _qk_norm(backend: BackendSpecProvider, model: ModelConfig, num_heads: int) -> type | ModuleSpec:
    """Returns the norm of ``num_heads`` queries or keys; IdentityOp where there is none."""
    if not model.qk_norm:
        return IdentityOp
    if model.qk_norm_scope == "all_heads":
        # Beside megatron-core's qk_layernorm=False (model.transformer says why).
        return ModuleSpec(module=AllHeadsRMSNorm, params={"num_heads": num_heads})
    return backend.layer_norm(rms_norm=True, for_qk=True)


def _latent_attention(backend: BackendSpecProvider, model: ModelConfig) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True, for_qk=True)
    return ModuleSpec(
        module=latent_attention(),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            # Whole on every rank. megatron-core takes column-parallel ones, too, whose outputs it
            # gathers; then the key that all heads share gets the gradient of one rank's heads only.
            linear_q_down_proj=backend.linear(),
            linear_q_up_proj=backend.column_parallel_linear(),
            linear_kv_down_proj=backend.linear(),
            linear_kv_up_proj=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if model.mla.q_lora_rank else IdentityOp,
            kv_layernorm=norm,
        ),
    )


def _attention(backend: BackendSpecProvider, model: ModelConfig) -> ModuleSpec:
    if model.attention == "mla":
        return _latent_attention(backend, model)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=_qk_norm(backend, model, model.num_attention_heads),
            k_layernorm=_qk_norm(backend, model, model.num_query_groups),
        ),
    )


def _layer(backend: BackendSpecProvider, model: ModelConfig, mlp: ModuleSpec) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True, for_qk=False)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention(backend, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


@dataclass(frozen=True)
class LayerSpecs:
    """Holds what the layers of a model are built from.

    Attributes:
        backend: provides linear layers, norms and attention.
        dense: a layer with a dense MLP.
        moe: a layer with experts; None for a model without.
    """

    backend: BackendSpecProvider
    dense: ModuleSpec
    moe: ModuleSpec | None


def layer_specs(
    model: ModelConfig,
    mone: MoNEConfig,
    *,
    sources: MicrobatchSources,
    on_cpu: bool,
    own_attention: bool,
    sparsity: Sparsity | None = None,
) -> LayerSpecs:
    """Returns the kinds of layers of a model.

    Args:
        model: the settings of the model.
        mone: the method's settings.
        sources: see :class:`mone_megatron.mone.layer.MicrobatchSources`.
        on_cpu: whether the model is on CPU.
        own_attention: see :func:`spec_provider`.
        sparsity: the loss on hidden values of routed experts; None for none.
    """
    backend = spec_provider(on_cpu=on_cpu, own_attention=own_attention)
    mlp = _product_key(model) if model.experts == "product_key" else _dense_mlp(backend, mone)
    dense = _layer(backend, model, mlp)
    moe = None
    if model.num_experts:
        moe = _layer(backend, model, _moe_mlp(backend, model, mone, sources, sparsity))
    return LayerSpecs(backend, dense, moe)


def decoder_spec(
    layers: LayerSpecs,
    transformer: TransformerConfig,
    *,
    layer_pattern: list[int],
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Returns the layers of one pipeline stage (and virtual stage).

    Args:
        layers: from :func:`layer_specs`.
        transformer: megatron-core's configuration.
        layer_pattern: 1 for MoE, 0 for dense, one entry a layer of the whole model.
        vp_stage: model chunk of an interleaved pipeline.
    """
    kinds = {0: layers.dense, 1: layers.moe}
    first = get_transformer_layer_offset(transformer, vp_stage=vp_stage)
    count = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[kinds[kind] for kind in layer_pattern[first : first + count]],
        layer_norm=layers.backend.layer_norm(rms_norm=True),
    )


def prediction_spec(
    layers: LayerSpecs, *, depth: int, last: bool
) -> MultiTokenPredictionBlockSubmodules | None:
    """Returns the layers of multi-token prediction; None where a chunk has none.

    They are of the kind of a model's last layer: with experts where it has experts.

    Args:
        layers: from :func:`layer_specs`.
        depth: ``model.mtp.depth``.
        last: whether the chunk has the output layer, which these layers stand before.
    """
    if not last or depth == 0:
        return None
    layer = get_mtp_layer_spec_for_backend(layers.moe or layers.dense, layers.backend)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * depth)
