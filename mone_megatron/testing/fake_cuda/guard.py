"""Loads a CUDA device guard and hooks that do nothing: a torch without CUDA takes CUDA tensors.

The guard must be loaded before torch is imported; this module does not import it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path

_SOURCE = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
namespace { using namespace c10;
const Stream ONE(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
struct FakeCuda final : impl::DeviceGuardImplInterface {
  FakeCuda() {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return ONE; }
  Stream getNewStream(Device, int) const override { return ONE; }
  Stream exchangeStream(Stream) const override { return ONE; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeCuda);
struct FakeHooks final : at::CUDAHooksInterface {
  FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
};
using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry; using at::CUDAHooksArgs;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
}
"""


def why_not() -> str | None:
    """Returns why there can be no fake device on this machine; None when there can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None


def load_guard() -> None:
    """Builds the guard once for each torch and user, and loads it.

    Raises:
        RuntimeError: without g++, or when what it says is an error.
    """
    if reason := why_not():
        raise RuntimeError(f"no fake CUDA device: {reason}; install it (Debian: apt install g++)")
    spec = find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    version = (torch / "version.py").read_bytes()
    key = zlib.crc32(str(torch).encode() + version + _SOURCE.encode())
    library = Path(tempfile.gettempdir()) / f"fake_cuda_guard_{key}_{os.getuid()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(_SOURCE, encoding="utf-8")
            command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(source)]
            command += [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"]
            command += ["-lc10", "-ltorch_cpu", "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"no fake CUDA device: g++ failed: {done.stderr[-2000:]}")
            # Several processes may build it at once: whichever is last replaces the same library.
            built.replace(library)
    ctypes.CDLL(str(library))
