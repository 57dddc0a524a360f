from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mone_megatron.config.schema import DeviceConfig
from mone_megatron.parallel.device import (
    Device,
    choose_kind,
    open_device,
    open_process_group,
)
from mone_megatron.parallel.world import World

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without a launcher's variables."""
    for name in (*NAMES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("environment")
def test_one_process_without_a_launcher() -> None:
    assert World.from_environment() == World(rank=0, size=1, local_rank=0, local_size=1)


def test_torchruns_variables(environment: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "8", "1", "4"), strict=True):
        environment.setenv(name, value)
    assert World.from_environment() == World(rank=5, size=8, local_rank=1, local_size=4)


@pytest.mark.parametrize("missing", NAMES)
def test_half_a_launch_is_refused(environment: pytest.MonkeyPatch, missing: str) -> None:
    for name in NAMES:
        if name != missing:
            environment.setenv(name, "1")
    with pytest.raises(ValueError, match=f"set but not {missing}; start with torchrun, or unset"):
        World.from_environment()


def test_values_that_are_not_numbers_are_refused(environment: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        environment.setenv(name, "1")
    environment.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match=r"'WORLD_SIZE': 'two'.* not all whole numbers") as raised:
        World.from_environment()
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    assert choose_kind(DeviceConfig(kind="auto")) == "cpu"
    assert choose_kind(DeviceConfig(kind="cpu")) == "cpu"
    with pytest.raises(ValueError, match=r"device\.kind: cuda .* use device.kind=cpu"):
        choose_kind(DeviceConfig(kind="cuda"))


@pytest.fixture
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_open_device_on_cpu() -> None:
    device = open_device(DeviceConfig(kind="cpu", threads=1), World())
    assert (device.kind, device.threads, torch.get_num_threads()) == ("cpu", 1, 1)
    assert device.torch_device == torch.device("cpu")
    assert device.dtype is torch.float32
    assert "1 process of 1 thread" in device.hardware
    device.synchronize()
    assert open_device(DeviceConfig(kind="cpu", dtype="bf16"), World()).dtype is torch.bfloat16
    # More processes than cores: still one thread each.
    crowded = open_device(DeviceConfig(kind="cpu"), World(size=10_000, local_size=10_000))
    assert crowded.threads == 1


@pytest.mark.usefixtures("environment")
def test_one_process_needs_no_rendezvous() -> None:
    device = Device("cpu", torch.device("cpu"), torch.float32, 1, "")
    open_process_group(device, World(), timeout_seconds=30)
    try:
        assert dist.get_world_size() == 1
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
