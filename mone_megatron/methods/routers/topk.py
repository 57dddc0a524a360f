"""Routes each token to the k experts with the largest logits: megatron-core's own router."""

from mone_megatron.methods.router import Router

METHOD = Router(
    name="topk",
    formula="the k experts with the largest logits",
    source="megatron-core",
    reference="megatron.core.transformer.moe.router:TopKRouter",
    stock=True,
)
