"""For all tests: the CPU backend before any megatron import, one thread, real ranks on demand."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist

from mone_megatron.parallel.megatron_compat import forget_layer_losses, install_cpu_backend

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


TESTS = Path(__file__).parent
# Files that take longest, most of it in processes of their own.
LONGEST = (
    "integration/test_layouts_agree.py",
    "integration/test_resume.py",
    "planning/test_planning_ranks.py",
    "faults/test_bad_loss.py",
    "slurm/test_slurm.py",
    "integration/test_pretrain.py",
    "faults/test_signals.py",
    "launch/test_torchrun.py",
    "faults/test_kills.py",
    "faults/test_checkpoint_contents.py",
    "faults/test_row12_hangs.py",
    "faults/test_full_disk.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests: none is begun when the other process is done.

    pytest-xdist keeps this order with ``--no-loadscope-reorder``, as in ``make test``.
    """
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path, len(places)), -counts[item.path]))


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
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    open_groups(ParallelConfig(), TrainConfig(), timeout_seconds=60)
    forget_layer_losses()
    yield
    # Two process-wide globals of megatron-core.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    forget_layer_losses()
    close_groups()
