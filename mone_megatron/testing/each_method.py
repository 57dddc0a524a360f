"""Lists what a run can take from the registries, and what each method cannot be without.

For tests that try every method there is, those of installed packages too.
"""

from __future__ import annotations

from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.losses import LOSSES
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.registry import Registry
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES

# Each registry with its key and the method that every other test trains with.
REGISTRIES: tuple[tuple[Registry, str, str], ...] = (
    (SCORES, "mone.score", "abs_activation"),
    (ACTIVATIONS, "model.activation", "silu"),
    (RULES, "mone.rule", "topk"),
    (LOSSES, "mone.balance.kind", "switch"),
    (ROUTERS, "model.router.kind", "topk"),
    (GATES, "model.gate", "full"),
    (OPTIMIZERS, "optim.name", "adam"),
)


def needed(override: str) -> tuple[str, ...]:
    """Returns the settings that a method cannot be without, beside ``KEY=NAME``."""
    key, _, name = override.partition("=")
    if key == "model.router.kind" and ROUTERS[name].loss is not None:
        # It brings its own balance. A coefficient that matters within these few steps.
        return (
            "model.router.balance=[none]",
            "model.router.balance_coeff=[0.0]",
            "model.router.density.start=0.01",
        )
    if key == "mone.balance.kind" and LOSSES[name].normalized is False:
        return ("mone.balance.normalize=false",)
    return ()
