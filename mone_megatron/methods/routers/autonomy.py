"""Routes to the experts that a token excites most: those of largest norm ``|x A|``.

Each expert has a projection A of low rank; its norm takes the place of a router's logit, and all
else is megatron-core's router: top-k, the softmax over the chosen ones, balance losses.
"""

from mone_megatron.methods.router import RankOptions, Router, norms, projections

METHOD = Router(
    name="autonomy",
    formula="the k experts with the largest |x A| of their low-rank projections A",
    source="Autonomy-of-Experts, arXiv 2501.13074",
    weights=projections,
    logits=norms,
    latent=lambda settings: settings.experts * settings.rank,
    options=RankOptions,
)
