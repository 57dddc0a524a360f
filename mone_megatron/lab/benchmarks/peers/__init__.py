"""Compares our training step with what else trains the same model in fp32 on a CPU.

Beside ours are transformers' model of the same shape and the matrix products of a step alone. Two
other stacks cannot be there: OLMo-core and torchtitan assert kernels that only GPUs have, or write
bf16 into their layers, so neither trains a Mixture of Experts in fp32 on a CPU.
"""
