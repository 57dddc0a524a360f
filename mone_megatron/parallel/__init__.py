"""Holds devices, process groups, and every workaround for megatron-core."""
