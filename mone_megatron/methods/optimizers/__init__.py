"""Holds the optimizers: ``optim.name``. One file each."""

from mone_megatron.methods.optimizer import Optimizer
from mone_megatron.methods.registry import Registry

OPTIMIZERS: Registry[Optimizer] = Registry(
    Optimizer, key="optim.name", package="mone_megatron.methods.optimizers"
)
