"""Trains Mixture of Neuron Experts (arXiv 2510.05781) on Megatron parallelism."""

__version__ = "0.1.0"
