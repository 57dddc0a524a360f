"""Imports what a rank on the CPU needs: in the process that warm ranks are forked from, once."""

import torch
import torch._dynamo

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend

torch.set_num_threads(1)
# Before a module of ours imports megatron-core.
install_cpu_backend()

import mone_megatron.pretrain  # noqa: E402
import mone_megatron.report.run_page  # noqa: E402
import mone_megatron.testing.processes  # noqa: E402
import mone_megatron.testing.trainer  # noqa: E402
import mone_megatron.train.run  # noqa: E402, F401
