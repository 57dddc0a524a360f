"""Holds the ways to steer a measured density: ``mone.density.step``. One file each."""

from mone_megatron.methods.density_step import DensityStep
from mone_megatron.methods.registry import Registry

DENSITY_STEPS: Registry[DensityStep] = Registry(
    DensityStep, key="mone.density.step", package="mone_megatron.methods.density_steps"
)
