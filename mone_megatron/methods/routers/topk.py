"""Routes each token to the k experts with the largest logits: megatron-core's own router."""

from mone_megatron.methods.router import Router

METHOD = Router(
    name="topk",
    formula="the k experts with the largest logits",
    source="megatron-core",
    reference="mone_megatron.mone.topk_router:ShorterTopKRouter",
    stock=True,
)
