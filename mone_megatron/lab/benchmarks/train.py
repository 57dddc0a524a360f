"""Times whole training steps: MoNE in its modes beside the MoE baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from mone_megatron.config.schema import Config
from mone_megatron.kernels import ops
from mone_megatron.lab.benchmarks.experiments import OpenExperiment, open_experiments, step_action
from mone_megatron.lab.benchmarks.measure import Spread, interleave, ratio
from mone_megatron.parallel.groups import close_groups
from mone_megatron.planning.flops import flops_per_step

MOE = "MoE"


@dataclass(frozen=True)
class TrainCost:
    """Holds the cost of one way to train. Ratios are over the MoE baseline's step."""

    name: str
    step_seconds: Spread
    over_moe: Spread
    over_moe_processor: Spread
    tokens_per_second: float
    # Of all ranks: matrix products that were run.
    tflops: float
    # Of rank 0's GPU, over the way's steps; None on CPU.
    peak_gigabytes: float | None


@dataclass(frozen=True)
class TrainResult:
    """Holds the costs of all ways, from rank 0."""

    hardware: str
    tokens_per_step: int
    costs: list[TrainCost]


@dataclass
class _Peak:
    """Holds the most GPU memory that was allocated, over the measurements of one way."""

    bytes: int = 0


def measure_train(moe: Config, mone: Config, *, repeats: int, steps: int) -> TrainResult:
    """Times MoE's steps and MoNE's: as configured, in packed memory, without kernels.

    Collective over the default process group. Each trains a model of its own, so all of them have
    to fit into memory together.

    Args:
        moe: the baseline, from :func:`mone_megatron.lab.benchmarks.ranks.prepare`.
        mone: the same with neuron selection.
        repeats: measurements of each.
        steps: in one measurement.
    """
    full, packed = (
        replace(mone, mone=replace(mone.mone, memory=memory)) for memory in ("full", "packed")
    )
    names = (MOE, "MoNE", "MoNE, packed memory", "MoNE, reference kernels")
    sessions = dict(zip(names, open_experiments([moe, full, packed, full], steps_in_memory=4),
                        strict=True))  # fmt: skip
    peaks = {name: _Peak() for name in names}
    actions = {
        name: _steps(
            session,
            step_action(session),
            steps,
            "reference" if name.endswith("reference kernels") else "auto",
            peaks[name],
        )
        for name, session in sessions.items()
    }
    samples = interleave(actions, repeats=repeats, warmup=2)
    ops.use_kernels("auto", moe.device.grouped_gemm)
    tokens = moe.train.global_batch_size * moe.train.seq_length
    hardware = sessions[MOE].device.hardware
    costs = []
    for name, session in sessions.items():
        seconds = Spread.of([once / steps for once in samples.clock[name]])
        flops = flops_per_step(session.config, session.data.vocab_size)
        costs.append(
            TrainCost(
                name=name,
                step_seconds=seconds,
                over_moe=ratio(samples.clock, name, MOE),
                over_moe_processor=ratio(samples.processor, name, MOE),
                tokens_per_second=tokens / seconds.median,
                tflops=flops.realised / seconds.median / 1e12,
                peak_gigabytes=peaks[name].bytes / 1e9 if peaks[name].bytes else None,
            )
        )
    close_groups()
    return TrainResult(hardware, tokens, costs)


def _steps(
    session: OpenExperiment,
    action: Iterator[None],
    steps: int,
    kernels: ops.Kernels,
    peak: _Peak,
) -> Callable[[], None]:
    device = session.device.torch_device

    def run() -> None:
        ops.use_kernels(kernels, session.config.device.grouped_gemm)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(steps):
            next(action)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak.bytes = max(peak.bytes, torch.cuda.max_memory_allocated(device))

    return run
