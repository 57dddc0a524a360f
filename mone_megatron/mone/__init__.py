"""Implements Mixture of Neuron Experts (arXiv 2510.05781): the method, readable alone.

Read ``selection``, ``experts``, ``layer``, then ``balance`` and ``metrics``. Imports only
``mone_megatron.kernels`` and megatron-core.
"""
