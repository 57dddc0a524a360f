"""Computes the sigmoid of g, which makes the unit a GLU."""

from mone_megatron.methods.activation import Activation

METHOD = Activation(
    name="sigmoid",
    formula="sigmoid(g)",
    source="arXiv 1612.08083",
    reference="torch:sigmoid",
    keeps_input=False,
    fused="mone_megatron.kernels.triton_activations:SIGMOID",
)
