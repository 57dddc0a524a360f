"""Steers nothing."""

from mone_megatron.methods.density_step import DensityStep

METHOD = DensityStep(name="off", formula="1", source="the usual training", factor=None)
