"""Holds what makes a neuron's weight of its gate projection: ``model.activation``; a file each."""

from __future__ import annotations

from typing import cast

from mone_megatron.methods.activation import Activate, Activation
from mone_megatron.methods.registry import Registry, imported

ACTIVATIONS: Registry[Activation] = Registry(
    Activation, key="model.activation", package="mone_megatron.methods.activations"
)


def up_function(activate: Activate) -> Activate | None:
    """Returns what the activation whose function is given does to up projections, or None."""
    for activation in ACTIVATIONS:
        if activation.up is not None and activation.function is activate:
            return cast(Activate, imported(activation.up))
    return None
