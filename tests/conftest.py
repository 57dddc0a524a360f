"""For all tests: the CPU backend before any megatron import, one thread, real ranks on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

from mone_megatron.parallel.megatron_cpu import install_cpu_backend

# Before Triton is imported, by us or by megatron-core: without a GPU its interpreter runs kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before a test module is collected: importing it may import megatron-core.
install_cpu_backend()
torch.set_num_threads(1)

from mone_megatron.config.schema import ParallelConfig, TrainConfig  # noqa: E402
from mone_megatron.parallel.groups import close_groups, open_groups  # noqa: E402
from mone_megatron.testing.processes import Processes  # noqa: E402

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Processes]:
    """Two gloo ranks, kept for the session."""
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def four_processes() -> Iterator[Processes]:
    """Four gloo ranks, kept for the session."""
    with Processes(4) as processes:
        yield processes


@pytest.fixture
def one_process() -> Iterator[None]:
    """megatron-core's process groups with this process alone, and clean global state."""
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        get_moe_layer_wise_logging_tracker,
    )

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    open_groups(ParallelConfig(), TrainConfig(), timeout_seconds=60)
    get_moe_layer_wise_logging_tracker().clear()
    yield
    # Two process-wide globals of megatron-core.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    get_moe_layer_wise_logging_tracker().clear()
    close_groups()
