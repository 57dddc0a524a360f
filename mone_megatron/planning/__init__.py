"""Counts parameters and floating-point operations from the config alone."""

from mone_megatron.planning.flops import Flops, flops_per_step
from mone_megatron.planning.parameters import ParameterCount, count_parameters

__all__ = ["Flops", "ParameterCount", "count_parameters", "flops_per_step"]
