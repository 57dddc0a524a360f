"""Stands in for a CUDA device that is not there, to see what a training step would ask of one.

``python -m mone_megatron.testing.fake_cuda.step RANK WORLD key=value ...`` (needs g++) runs steps
of the real model on FakeTensors of ``cuda:0``, which have shapes and devices but no values, with
torch's "fake" process groups, and with launches of Triton kernels checked and skipped. It shows
operations between devices, tensors that NCCL would refuse, operands that grouped products would
refuse, and every place where the host would wait for the GPU. It cannot show numbers, times, or
what a kernel does.
"""
