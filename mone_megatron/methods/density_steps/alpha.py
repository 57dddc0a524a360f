"""Multiplies by alpha = 1 + rate while too much is kept, and divides by it otherwise.

The quantity goes up and down around the value that it looks for, by one alpha.
"""

from mone_megatron.methods.density_step import DensityReading, DensityStep


def alpha(reading: DensityReading) -> float:
    """Returns alpha or 1 / alpha."""
    factor = 1 + reading.rate
    return factor if reading.density > reading.target else 1 / factor


METHOD = DensityStep(
    name="alpha",
    formula="alpha if density > target else 1 / alpha, with alpha = 1 + rate",
    source="ReMoE, arXiv 2412.14711",
    factor=alpha,
)
