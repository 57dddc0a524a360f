"""What makes a neuron's weight of its gate projection: ``model.activation``. One file each."""

from mone_megatron.methods.activation import Activation
from mone_megatron.methods.registry import Registry

ACTIVATIONS: Registry[Activation] = Registry(
    Activation, key="model.activation", package="mone_megatron.methods.activations"
)
