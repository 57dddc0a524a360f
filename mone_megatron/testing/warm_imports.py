"""Imports what a rank on the CPU needs: in the process that warm ranks are forked from, once.

What a run imports when it first needs it is imported here, too, or each rank would do so again:
Hydra's plugins and the registries' methods by composing and checking a run, and the modules below.
Of the experiments that most ranks train, what differs in values alone is then composed quickly.
"""

import gc

import torch
import torch._dynamo
import torch.utils.serialization

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend

torch.set_num_threads(1)
# What is imported stays, and is not looked through for garbage while more is.
gc.disable()
# Before a module of ours imports megatron-core.
install_cpu_backend()

import megatron.core.dist_checkpointing.strategies.torch  # noqa: E402, F401

import mone_megatron.data.preprocess  # noqa: E402
import mone_megatron.data.stdlib  # noqa: E402
import mone_megatron.pretrain  # noqa: E402
import mone_megatron.report.run_page  # noqa: E402
import mone_megatron.testing.processes  # noqa: E402
import mone_megatron.testing.trainer  # noqa: E402
import mone_megatron.train.run  # noqa: E402, F401
from mone_megatron.config.load import compose  # noqa: E402
from mone_megatron.config.validate import validate  # noqa: E402

for experiment in ("experiment=tiny_mone", "experiment=tiny_moe"):
    for device in ((), ("device=cpu",)):
        validate(compose([experiment, *device]), world_size=1)
# What is imported is never freed: collections that looked at it would copy its pages in each fork.
gc.collect()
gc.freeze()
gc.enable()
