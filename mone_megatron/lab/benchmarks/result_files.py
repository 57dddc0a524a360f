"""Writes benchmark results as text and as JSON, each with where it ran."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_megatron import whole_files
from mone_megatron.report.formatting import plus_minus

if TYPE_CHECKING:  # only their fields are read: no megatron-core here
    from mone_megatron.lab.benchmarks.cost import Cost
    from mone_megatron.lab.benchmarks.decode import DecodeResult
    from mone_megatron.lab.benchmarks.generate import GenerateCost
    from mone_megatron.lab.benchmarks.layer import LayerResult
    from mone_megatron.lab.benchmarks.peers.compare import PeersResult
    from mone_megatron.lab.benchmarks.save import SaveCost
    from mone_megatron.lab.benchmarks.select import SelectCost
    from mone_megatron.lab.benchmarks.spine import SpineCost
    from mone_megatron.lab.benchmarks.ties import TieStatistics
    from mone_megatron.lab.benchmarks.ties_model import ModelTies
    from mone_megatron.lab.benchmarks.ties_training import TrainingTies
    from mone_megatron.lab.benchmarks.train import TrainResult


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that speed depends on."""
    packages = ["torch", "megatron-core", "numpy"]
    packages += [
        name for name in ("triton", "transformers") if importlib.util.find_spec(name) is not None
    ]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def environment(hardware: str) -> dict[str, Any]:
    """Returns where a result comes from; ``load`` is the one-minute load average."""
    load = os.getloadavg()[0]
    return {"hardware": hardware, "load": round(load, 2), "versions": versions()}


def environment_lines(facts: dict[str, Any]) -> list[str]:
    """Returns :func:`environment` as lines for people."""
    named = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return [f"on {facts['hardware']}; load {facts['load']}", named]


def spine_lines(cost: SpineCost) -> list[str]:
    """Returns lines with the median (smallest..largest) of each figure."""
    return [
        f"trainer / bare loop, tokens/s: {cost.throughput_ratio}",
        f"  by processor time: {cost.processor_ratio}",
        f"trainer: {cost.trainer_tokens_per_second} tokens/s",
        f"bare loop: {cost.bare_tokens_per_second} tokens/s",
    ]


def cost_lines(cost: Cost) -> list[str]:
    """Returns lines with the median (smallest..largest) of each figure."""
    lines = [
        f"MoNE / MoE, step time: {cost.step_ratio}",
        f"  by processor time: {cost.step_processor_ratio}",
        f"MoE step: {cost.moe_step_seconds} s",
        f"MoNE step: {cost.mone_step_seconds} s",
        f"parts, timed apart on {cost.rows} rows of {cost.neurons} neurons, for all layers and "
        "microbatches of a step:",
    ]
    lines += [
        f"  {part.name:<48} {part.milliseconds_per_step} ms, {part.share_of_step:.1%} of a MoE step"
        for part in cost.parts
    ]
    lines.append(
        f"layer metrics every {cost.layer_interval} steps (logging.layer_interval): "
        f"{cost.panel_share_of_step:.2%} of a MoE step on average"
    )
    return lines


def save_lines(cost: SaveCost) -> list[str]:
    """Returns lines with the median (smallest..largest) of each figure."""
    return [
        f"a checkpoint of {cost.megabytes:.1f} MB stops training",
        f"  sync:  {cost.sync_seconds} s",
        f"  async: {cost.async_seconds} s ({cost.async_start_seconds} s to hand over, "
        f"{cost.async_finish_seconds} s to finish)",
        f"async / sync: {cost.blocking_ratio}",
        f"an async save is written within {cost.async_written_seconds} s; steps meanwhile / a "
        f"step without: {cost.step_ratio}",
    ]


def select_lines(cells: list[SelectCost]) -> list[str]:
    """Returns a header and one line a cell."""
    lines = [
        f"{'rows':>6} {'f':>5} {'K':>5}  ours, ms; torch.topk + scatter / ours; kthvalue / ours"
    ]
    lines += [
        f"{cell.rows:>6} {cell.neurons:>5} {cell.kept:>5}  {cell.ours_milliseconds}; "
        f"{cell.topk_scatter_over_ours}; {cell.kthvalue_over_ours}"
        for cell in cells
    ]
    return lines


def layer_lines(result: LayerResult) -> list[str]:
    """Returns the shape, a header, one line a way, and what all of them save."""
    shape = result.shape
    lines = [
        f"h={shape.hidden} f={shape.neurons}, {shape.chosen} of {shape.experts} experts, "
        f"{shape.tokens} tokens, keep ratio {result.keep_ratio:g}, {result.dtype}; forward and "
        "backward of the experts",
        f"{'':<24} time / MoE; by processor time; ms; TFLOPS; saved, MB (times smaller than MoE's)",
    ]
    lines += [
        f"{cost.name:<24} {cost.over_moe}; {cost.over_moe_processor}; {cost.milliseconds}; "
        f"{cost.tflops:.3g}; {cost.saved_megabytes:.1f} ({cost.saved_times_smaller:.2f})"
        for cost in result.costs
    ]
    return [*lines, f"each also saves its input, {result.input_megabytes:.1f} MB"]


def peers_lines(result: PeersResult) -> list[str]:
    """Returns the first size's times and ratios, then growth, memory and start."""
    first = result.cells[0]
    lines = [
        f"steps of {result.tokens_per_step:,} tokens, fp32 on a CPU; transformers computes experts "
        f"by {first.experts}",
        f"{'':<16} s a step; processor s; peak memory, MiB; parameters; loss",
    ]
    for name, seconds in first.seconds.items():
        loss = f"{first.losses[name]:.4f}" if name in first.losses else "-"
        lines.append(
            f"{name:<16} {seconds}; {first.processor_seconds[name]}; "
            f"{result.peak_megabytes[name]:.0f}; {first.parameters[name]:,}; {loss}"
        )
    lines.append(f"{'size':<16} ratio: by the clock; by processor time")
    for cell in result.cells:
        lines += [
            f"{cell.size or 'as given':<16} {one.above} / {one.below}: {one.clock}; {one.processor}"
            for one in cell.ratios
        ]
    lines += [
        f"{size:<16} growth of {name} over transformers', processor time: {growth:.3f}"
        for size, grown in result.growth.items()
        for name, growth in grown.items()
    ]
    for name, seen in result.implementations.items():
        told = seen if isinstance(seen, str) else f"{seen:.2f} s for one microbatch"
        lines.append(f"transformers, {name}: {told}")
    lines += [
        f"process start to the end of step 1, {name}: {seconds} s; processor "
        f"{result.start_processor[name]} s"
        for name, seconds in result.starts.items()
    ]
    return lines


def train_lines(result: TrainResult) -> list[str]:
    """Returns a header and one line a way."""
    lines = [
        f"steps of {result.tokens_per_step:,} tokens",
        f"{'':<24} step time / MoE; by processor time; s a step; tokens/s; TFLOPS; peak GPU memory",
    ]
    for cost in result.costs:
        peak = "-" if cost.peak_gigabytes is None else f"{cost.peak_gigabytes:.2f} GB"
        lines.append(
            f"{cost.name:<24} {cost.over_moe}; {cost.over_moe_processor}; {cost.step_seconds}; "
            f"{cost.tokens_per_second:,.0f}; {cost.tflops:.3g}; {peak}"
        )
    return lines


def decode_lines(result: DecodeResult) -> list[str]:
    """Returns the shape, a header and one line a cell."""
    sizes = result.shape
    lines = [
        f"h={sizes['hidden']} f={sizes['neurons']}, {sizes['chosen']} of {sizes['experts']} "
        f"experts, {result.dtype}; one step of the experts",
        f"{'batch':>5} {'keep':>6}  fastest dense / ours; by processor time; limit by bytes (share "
        "reached); ms of each way",
    ]
    for cell in result.cells:
        each = ", ".join(f"{name} {ms:.3g}" for name, ms in cell.milliseconds.items())
        lines.append(
            f"{cell.tokens:>5} {cell.keep_ratio:>6g}  {cell.speed_up}; {cell.speed_up_processor}; "
            f"{cell.limit:.2f} ({cell.share_of_limit:.0%}); {each}"
        )
    return lines


def generate_lines(cost: GenerateCost) -> list[str]:
    """Returns the sizes, the speed-up, and one line a way with its tokens a second."""
    sizes = ", ".join(f"{name} {size}" for name, size in cost.shape.items())
    lines = [
        f"{sizes}, keep ratio {cost.keep_ratio:g}, {cost.dtype}; {cost.new_tokens} new tokens, "
        f"batch 1; experts are {cost.experts_share:.0%} of the time ({cost.dense})",
        f"{cost.dense} / mone_sparse, time: {cost.speed_up}; by processor time: "
        f"{cost.speed_up_processor}; limit: {cost.limit:.2f}",
    ]
    return lines + [
        f"  {name:<12} {speed} tokens/s" for name, speed in cost.tokens_per_second.items()
    ]


_TIES_HEADER = (
    f"{'':<24} loss; rows decided by ties; neurons that tie at the threshold (of them dropped); "
    "load the tie rule adds to the first and last indices; correlation of load and index; dead; "
    "load entropy"
)


def _ties_cells(name: str, loss: str, ties: TieStatistics) -> str:
    correlation = "-" if ties.correlation is None else f"{ties.correlation:+.3f}"
    return (
        f"{name:<24} {loss}; {ties.rows_decided_by_ties:.2%}; {ties.tied:.2f} "
        f"({ties.dropped:.2f}); "
        f"{ties.bias_over_parts[0]:+.2%}, {ties.bias_over_parts[-1]:+.2%}; {correlation}; "
        f"{ties.dead_share:.2%}; {ties.entropy:.4f}"
    )


def training_ties_lines(result: TrainingTies) -> list[str]:
    """Returns one line a model, then what its router does, under a header."""
    one = result.trained[0].ties
    lines = [
        f"K={one.kept} of f={one.neurons}; {result.steps} steps of {result.tokens_per_step:,} "
        f"tokens, counted over the last {result.counted_steps}",
        _TIES_HEADER,
    ]
    lines += [
        _ties_cells(f"{model.way}, seed {model.seed}", f"{model.loss:.4f}", model.ties)
        for model in result.trained
    ]
    lines += [
        f"router of {model.way}, seed {model.seed}: equal logits at the edge of the choice in "
        f"{model.router.tied:.3%} of the tokens ({model.router.dtype}), were they rounded to bf16 "
        f"in {model.router.tied_in_bf16:.3%}"
        for model in result.trained
        if model.router is not None
    ]
    return lines


def model_ties_lines(result: ModelTies) -> list[str]:
    """Returns one line a dtype and tie order, under a header."""
    one = result.measured[0].ties
    lines = [
        f"{result.model}: K={one.kept} of f={one.neurons} by {result.score}; {result.tokens:,} "
        "tokens",
        _TIES_HEADER,
    ]
    for measured in result.measured:
        error = math.nan if measured.loss_error is None else measured.loss_error
        loss = plus_minus(f"{measured.loss:.4f}", error)
        lines.append(_ties_cells(measured.way, loss, measured.ties))
    return lines


def write_json(path: Path, benchmark: str, facts: dict[str, Any], result: Any) -> None:
    """Writes one object: ``benchmark``, the environment, and ``result``."""
    whole_files.write_json(path, {"benchmark": benchmark, **facts, "result": _plain(result)})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value)
