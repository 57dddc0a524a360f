"""Moves by the square of how far the density is from the target: slower the nearer it is."""

from mone_megatron.methods.density_step import DensityReading, DensityStep


def squared(reading: DensityReading) -> float:
    """Returns 1 + rate (density - target)^2, or one divided by it below the target."""
    excess = reading.density - reading.target
    factor = 1 + reading.rate * excess**2
    return factor if excess > 0 else 1 / factor


METHOD = DensityStep(
    name="squared",
    formula="(1 + rate (density - target)^2)^sign(density - target)",
    source="Routing-Free MoE, arXiv 2604.00801",
    factor=squared,
)
