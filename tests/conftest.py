"""For all tests: the CPU backend before any megatron import, one thread, real ranks on demand."""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.megatron_release import megatron_folder, megatron_release
from mone_megatron.parallel.groups import close_groups, open_groups
from mone_megatron.parallel.megatron_compat.auxiliary_losses import forget_layer_losses
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.testing.processes import Processes

# Triton's interpreter runs kernels, if this is set before it is imported: the conftest of a folder
# that is named, which is imported before pytest_configure is called, may do so. Workers of
# pytest-xdist inherit it.
if "--gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# In a shell's background Ctrl-C is ignored, by all that is started there, too; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")


# What imports and collection make stays: garbage is not looked for in it, a fifth of their time.
gc.disable()

TESTS = Path(__file__).parent
# Files that take longest, most of it in processes of their own: first those of a minute and more,
# then those with a test or fixture of 15 s and more, alone on two cores.
LONGEST = (
    "integration/test_layouts_agree.py",
    "methods/test_methods_train.py",
    "integration/test_resume.py",
    "slurm/test_slurm.py",
    "integration/test_megatron_releases.py",
    "faults/test_bad_loss.py",
    "integration/test_pretrain.py",
    "faults/test_signals.py",
    "launch/test_torchrun.py",
    "planning/test_planning_ranks.py",
    "lab/studies/test_study.py",
    "kernels/test_triton_compiles.py",
    "faults/test_row12_hangs.py",
    "integration/test_prediction_layouts.py",
    "faults/test_wandb_outages.py",
    "lab/benchmarks/test_bench_tool.py",
    "lab/benchmarks/test_peers.py",
    "faults/test_kills.py",
    "faults/test_checkpoint_contents.py",
    "faults/test_full_disk.py",
    "faults/test_helpers.py",
)


_DEADLINE = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """On a GPU megatron-core must find torch.cuda as it is, so that process is another one."""
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the tests marked gpu, on CUDA and without the CPU backend, and no others",
    )
    parser.addoption(
        "--within",
        type=float,
        metavar="SECONDS",
        help="skip what has not begun by then, and the files that take longest (make check)",
    )
    parser.addoption(
        "--megatron",
        metavar="RELEASE",
        help="run no test on another megatron-core than this one (0.19.2)",
    )


def _refuse_another_megatron(config: pytest.Config) -> None:
    """Ends a run that a test of the later release was asked for and another one was found."""
    found = ".".join(map(str, megatron_release()))
    if config.getoption("megatron") not in (None, found):
        raise pytest.UsageError(
            f"--megatron {config.getoption('megatron')}: {megatron_folder()} is {found}; use the "
            "python of an environment that has it (make test-megatron-next makes one)"
        )


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the device before a test module is collected: importing one may import megatron."""
    _refuse_another_megatron(config)
    torch.set_num_threads(1)
    if not config.getoption("gpu"):
        install_cpu_backend()


def _only_of_this_device(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("gpu")
    if on_gpu:
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not on_gpu or not torch.cuda.is_available():
        why = "there is no GPU" if on_gpu else "needs a GPU: pytest --gpu, or make test-gpu"
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason=why))


def _begin_within(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the longest files, and keeps the order of the others, which is the caller's.

    Where there are no others, a test of one of them was changed, and as many as can begin do.
    """
    long = {TESTS / name for name in LONGEST}
    if all(item.path in long for item in items):
        long.clear()
    left_out = [item for item in items if item.path in long]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.path not in long]
    config.stash[_DEADLINE] = time.monotonic() + config.getoption("within")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test that has not begun in time, and undoes what a run in this process chose."""
    torch.set_num_threads(1)
    if time.monotonic() > item.config.stash.get(_DEADLINE, math.inf):
        pytest.skip("not begun within the time of --within; make test runs it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests: none is begun when the other process is done.

    pytest-xdist keeps this order with ``--no-loadscope-reorder``, as in ``make test``.
    """
    _only_of_this_device(config, items)
    if config.getoption("within") is not None:
        _begin_within(config, items)
        return
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path, len(places)), -counts[item.path]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says on which megatron-core the tests ran: parts of ``make test`` differ in nothing else."""
    terminalreporter.write_line(f"megatron-core {'.'.join(map(str, megatron_release()))}")


def pytest_collection_finish() -> None:
    """Keeps what was imported and collected from being looked through for garbage again."""
    gc.freeze()
    gc.enable()


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
    open_groups(ParallelConfig(), TrainConfig(), timeout_seconds=300)
    forget_layer_losses()
    yield
    # Two process-wide globals of megatron-core.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    forget_layer_losses()
    close_groups()
