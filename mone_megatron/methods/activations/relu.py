"""Computes max(g, 0), which makes the unit a ReGLU."""

from mone_megatron.methods.activation import Activation

METHOD = Activation(
    name="relu",
    formula="ReLU(g)",
    source="arXiv 2002.05202",
    reference="torch.nn.functional:relu",
    keeps_input=False,
    fused="mone_megatron.kernels.triton_activations:RELU",
)
