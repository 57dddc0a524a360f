"""Compiles ``compiled_cpu.c`` with the C compiler of this machine, and gives its functions.

torch passes over memory once for each of its operations; these functions once for all of a row. As
Triton's for GPUs, they are compiled where they run, for the processor that is there: once (two
seconds), into the user's cache. Where there is no compiler, torch's operations compute.

The functions share torch's threads: they are compiled for OpenMP, but find it in torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-std=c11", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno",
    "-fno-trapping-math", "-fno-strict-aliasing",
    # Products and sums are rounded one after the other, as torch's operations round them.
    "-ffp-contract=off",
)  # fmt: skip
# Of x86: gcc leaves half of the widest registers unused otherwise.
_X86_FLAGS = ("-mprefer-vector-width=512",)
_SECONDS = 60.0

# Kinds of arguments: addresses of tensors (None for none), whole numbers, fp32.
_P, _N, _F, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "glu_forward": [_N, _N, _N, _P, _N, _P, _P, _P, _P, _P, _T],
    "glu_sums": [_N, _N, _P, _P, _P, _P, _P, _P, _T],
    "glu_backward": [
        _N, _N, _P, _N, _P, _N, _P, _P, _P, _P, _N, _P, _P, _P, _P, _P, _N, _P, _P, _T,
    ],
    "rms_norm_forward": [_N, _N, _N, _N, _N, _P, _P, _F, _P, _P, _T],
    "rms_norm_backward": [_N, _N, _N, _N, _N, _P, _P, _P, _P, _N, _N, _P, _P, _P, _T],
    "rotate": [_N, _N, _N, _N, _P, _N, _N, _N, _P, _P, _P, _N, _N, _N, _F, _P, _T],
    "count_rows": [_N, _N, _P, _P, _P],
    "order_rows": [_N, _N, _P, _P, _P, _P, _P, _P],
    "copy_rows": [_N, _N, _P, _P, _P, _T],
    "add_rows": [_N, _N, _N, _P, _P, _P, _P, _T],
    "attention_forward": [
        _P, _N, _N, _N, _N, _N, _N, _F, _P, _N, _N, _N, _P, _N, _N, _N, _P, _N, _N, _N, _P, _T, _P,
        _P, _T,
    ],
    "attention_backward": [
        _P, _N, _N, _N, _N, _N, _N, _F, _P, _N, _N, _N, _P, _N, _N, _N, _P, _N, _N, _N, _P, _P, _P,
        _P, _P, _P, _T,
    ],
    "cross_entropy_forward": [_N, _N, _N, _P, _P, _P, _P, _T],
    "largest_places": [_N, _N, _N, _P, _P, _T],
    "grouped_rows": [_P, _N, _P, _T, _T, _T, _P, _T, _P, _P],
    "grouped_weights": [_P, _N, _P, _T, _T, _P, _T, _P, _T, _P, _T],
    "attend_forward": [_P],
    "attend_backward": [_P],
    "experts_begin": [_P, _N, _N, _N, _N],
    "experts_end": [_P, _N, _N, _N, _N],
    "experts_backward": [_P, _N, _P],
    "route_forward": [_P],
    "route_losses": [_P],
    "route_backward": [_P],
}  # fmt: skip
_RESULTS = {"count_rows": _N}


def _fields(**kinds: str) -> list[tuple[str, Any]]:
    """Returns fields of a structure: names by kind, in the order in which they are given."""
    of_kind = {"addresses": _P, "numbers": _N, "floats": _F}
    return [(name, of_kind[kind]) for kind, names in kinds.items() for name in names.split()]


class ExpertsArguments(ctypes.Structure):
    """Is ``struct experts``: what the functions of whole experts read and write."""

    _fields_ = _fields(
        addresses="product counts token place tokens probs gate_up_weight down_weight scale "
        "scale_grad gate_up activation mask inverse rows hidden out kept weight grad_out grad_sums "
        "grads grad_hidden grad_gate_up grad_tokens grad_probs of_gate_up of_down",
        numbers="width neurons k adding threads",
    )


class HeadsArguments(ctypes.Structure):
    """Is ``struct heads_made``: what attention reads and writes that makes its heads itself."""

    _fields_ = _fields(
        addresses="product mixed query_weight key_weight cos sin inverse weights room context grad "
        "grad_mixed parts",
        numbers="length batch groups per_key width step keeping threads",
        floats="scale query_eps key_eps",
    )


class RoutedArguments(ctypes.Structure):
    """Is ``struct routed``: what the functions of a router read and write."""

    _fields_ = _fields(
        addresses="logits scores log_sum probs chosen counts z_loss balance_loss grad_probs "
        "grad_z_loss grad_balance_loss grad_logits",
        numbers="tokens experts k of_all threads",
        floats="scaling z_factor balance_factor",
    )


@dataclass(frozen=True)
class Compiled:
    """Holds the functions, or why there are none.

    Attributes:
        library: None where nothing was compiled.
        problem: why, in words; "" where something was.
    """

    library: Any
    problem: str = ""


@functools.cache
def matrix_product() -> int | None:
    """Returns the address of the ``sgemm_`` that torch computes with; None where it shows none."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "sgemm_", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None


@functools.cache
def compiled() -> Compiled:
    """Returns the functions, which are compiled when no process has done so on this machine."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return Compiled(None, "there is no C compiler")
    name = f"compiled_cpu_{_key(compiler)}.so"
    try:
        folder = _own_folder()
        if folder is not None:
            kept = folder / name
            if not kept.exists():
                _compile(compiler, folder, name)
            return Compiled(_load(kept))
        with tempfile.TemporaryDirectory() as temporary:
            _compile(compiler, Path(temporary), name)
            return Compiled(_load(Path(temporary) / name))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return Compiled(None, f"{Path(compiler).name} failed: {said.strip().splitlines()[0]}")


def compiled_products() -> tuple[Any, int] | None:
    """Returns the functions, and the matrix product that some of them call, for those that do; None
    where either is missing.
    """
    library, product = compiled().library, matrix_product()
    return None if library is None or product is None else (library, product)


def address(tensor: Tensor | None) -> int | None:
    """Returns where a tensor's values begin; None for none."""
    return None if tensor is None else tensor.data_ptr()


def with_rows(tensor: Tensor) -> Tensor:
    """Returns a tensor as the functions and BLAS take it, which is copied only where it is not so.

    Args:
        tensor: its last dimension must lie in one piece, and its first one must not lie within that
            (the rows of an expanded tensor are all in one place).
    """
    in_order = tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[-1]
    return tensor if in_order else tensor.contiguous()


def threads() -> int:
    """Returns how many threads a function shall take: torch's."""
    return torch.get_num_threads()


def _key(compiler: str) -> str:
    """Returns what names the source, how it is compiled, by what and for which processor."""
    about = os.stat(compiler)
    parts = [_SOURCE.read_text(encoding="ascii"), *_flags(), compiler, _processor()]
    parts += [str(about.st_size), str(about.st_mtime_ns)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    return _FLAGS + (_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())


def _processor() -> str:
    """Returns what tells processors apart: homes are shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.platform()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _own_folder() -> Path | None:
    """Returns the cache, into which only this user writes; None where there can be none."""
    try:
        folder = Path.home() / ".cache" / "mone_megatron" / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
    except (OSError, RuntimeError):
        return None
    ours = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours and os.access(folder, os.W_OK) else None


def _compile(compiler: str, folder: Path, name: str) -> None:
    """Makes the library in a folder. Whoever looks meanwhile sees none, or a whole one."""
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        made, whole = Path(parts) / "made.o", Path(parts) / name
        # Linked without -fopenmp: the names are torch's then, and so are the threads.
        for command in (
            [compiler, *_flags(), "-c", str(_SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(whole), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        whole.replace(folder / name)


def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _RESULTS.get(name)
    return library
