"""Lists the checks, the most telling first, and what a machine without a GPU can run of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_megatron.lab.gpu_check import benchmark_files
from mone_megatron.testing.fake_cuda.guard import why_not

# The large experiments on one GPU, briefly.
_FEW = ("parallel=data", "data=stdlib", "checkpoint=never", "train.steps=12",
        "optim.warmup_steps=2", "train.micro_batch_size=4",
        "train.global_batch_size=8")  # fmt: skip

_RESUMED = "equal, or 1e-4 apart where torch adds in any order"


@dataclass(frozen=True)
class Check:
    """Describes one command, and what it needs.

    Attributes:
        name: of the check.
        asks: what it finds out.
        command: prints JSON in its last line, unless ``json_file`` is written.
        seconds: the longest that it may take.
        needs: those of "gpu", "triton", "g++" and "transformer_engine" that it needs.
        expected: what an H100 is expected to show, from models; "" where there is none.
        json_file: where the command writes its result; None for the last line.
        shown: what the page shows of the result, by name.
    """

    name: str
    asks: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    expected: str = ""
    json_file: Path | None = None
    shown: Callable[[Any], Mapping[str, Any]] = dict


def missing(need: str, *, gpu: bool) -> str | None:
    """Returns why something that a check needs is not there; None when it is."""
    if need == "gpu":
        return None if gpu else "there is no GPU"
    if need == "g++":
        return why_not()
    if need == "triton":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if need == "transformer_engine":
        there = importlib.util.find_spec("transformer_engine")
        return None if there else "Transformer Engine is not installed"
    raise ValueError(f"{need}: no such need")


def all_checks(output: Path, *, gpu: bool) -> list[Check]:
    """Returns the checks in their order.

    Args:
        output: the folder that their runs and results go to.
        gpu: whether there is one; without it trainer and kernels are checked on the CPU.
    """
    package, device = "mone_megatron.lab.gpu_check", "cuda" if gpu else "cpu"
    python = (sys.executable, "-m")
    small = ("--rows", "8", "--largest", "176") if not gpu else ()

    def training(what: str, name: str, *overrides: str) -> tuple[str, ...]:
        folder = str(output / name)
        return (*python, f"{package}.training", what, folder, "--device", device, *overrides)

    def bench(name: str, *options: str) -> tuple[tuple[str, ...], Path]:
        path = output / f"bench_{name}.json"
        call = "import sys; from mone_megatron.commands.bench import main; sys.exit(main())"
        command = (sys.executable, "-c", call, name, *options)
        return (*command, "--device", "cuda", "--dtype", "bf16", "--output", str(path)), path

    select, select_file = bench("select", "--rows", "65536", "--neurons", "704", "1024", "2048")
    layer, layer_file = bench("layer", "--hidden", "2048", "--neurons", "1024", "--experts", "64",
                              "--chosen", "8", "--tokens", "8192")  # fmt: skip
    decode, decode_file = bench("decode", "--hidden", "2048", "--neurons", "1024", "--experts",
                                "64", "--chosen", "8")  # fmt: skip
    return [
        Check("machine", "versions, and the first operations", (*python, f"{package}.machine"), 90),
        Check("kernels", "Triton kernels against the reference",
              (*python, f"{package}.kernels", "--device", device, *small), 150, ("triton",),
              "all equal"),
        Check("cpu_and_gpu", "five steps in fp32 on the CPU and here",
              training("agree", "cpu_and_gpu"), 120, (), "less than 1e-4 apart"),
        Check("mone_0.9b", "training steps of MoNE", training("speed", "mone_0.9b",
              "experiment=mone_0.9b", *_FEW), 100, ("gpu",), "0.4 of the peak in experts"),
        Check("moe_0.9b", "training steps of the baseline", training("speed", "moe_0.9b",
              "experiment=moe_0.9b", *_FEW), 100, ("gpu",), "MoNE, less 2%"),
        Check("resume", "a resumed run beside one that went on, with torch's fused AdamW",
              training("resume", "resume"), 120, (), _RESUMED),
        Check("resume_te", "the same with Transformer Engine's FusedAdam",
              training("resume_te", "resume_te"), 120, ("gpu", "transformer_engine"), _RESUMED),
        Check("waits", "how often the host waits for the GPU", training("waits", "waits"), 90,
              ("gpu",), "3 a step, and 3 a layer and microbatch (docs/gpu.md)"),
        Check("select", "the exact top-k mask beside torch's", select, 60, ("gpu", "triton"),
              "1 to 1.5 times the memory bound, by instructions", select_file,
              benchmark_files.select),
        Check("layer", "a layer of MoNE beside MoE", layer, 90, ("gpu",), "1.02 times as long",
              layer_file, benchmark_files.layer),
        Check("decode", "decoding beside all rows", decode, 60, ("gpu",),
              "at most 2.0 times as fast at batch 1, r=1/4", decode_file,
              benchmark_files.decode),
        Check("engine", "the experts' products by Transformer Engine", training("speed", "engine",
              "experiment=mone_0.9b", "device.grouped_gemm=transformer_engine", *_FEW), 100,
              ("gpu", "transformer_engine"),
              "mone_0.9b above, less 1 ms a microbatch: gradients are added in place"),
        Check("graphs", "attention as CUDA graphs beside attention without",
              training("graphs", "graphs"), 120, ("gpu", "transformer_engine"),
              "equal, or 1e-4 apart where torch adds in any order"),
        Check("fake_step", "the step on a device that is not there, EP 2 of 4 ranks",
              (*python, f"{package}.fake_step", str(output / "fake.json"), "0", "4",
               "experiment=tiny_mone", "parallel.expert=2", "model.num_layers=2"),
              300, ("g++",), "nothing refused; of ours 0 waits in layers, 3 outside; no kernel "
              "after the first step"),
        Check("compile", "registers, spills and instructions of the kernels, sm_90",
              (*python, "mone_megatron.lab.benchmarks.registers", "--neurons", "1024",
               "--output", str(output / "registers.json")), 200, ("triton",),
              "no bytes spilled", output / "registers.json", benchmark_files.registers),
    ]  # fmt: skip
