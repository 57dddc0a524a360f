"""Holds how routed experts compute their gate projections: ``model.gate``. One file each."""

from mone_megatron.methods.gate import Gate
from mone_megatron.methods.registry import Registry

GATES: Registry[Gate] = Registry(Gate, key="model.gate", package="mone_megatron.methods.gates")
