"""Mends what megatron-core breaks where Transformer Engine is not installed."""

from __future__ import annotations


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
