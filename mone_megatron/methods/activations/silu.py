"""Computes SiLU(g) = g / (1 + exp(-g)), which makes the unit a SwiGLU."""

from mone_megatron.methods.activation import Activation

METHOD = Activation(
    name="silu",
    formula="SiLU(g)",
    source="arXiv 2002.05202",
    reference="torch.nn.functional:silu",
    fused_on_cpu=True,
    fused="mone_megatron.kernels.triton_activations:SILU",
    fused_by_megatron=True,
)
