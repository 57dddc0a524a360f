"""Writes plans as text for people, as JSON for machines, and as files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mone_megatron.config.convert import Scalar
from mone_megatron.config.schema import Config
from mone_megatron.counting import counted
from mone_megatron.planning.match import Pair
from mone_megatron.planning.plan import GIB, Plan, notes, problems
from mone_megatron.planning.search import WORTH, Found, speed_up

PREDICTED = "predicted, not validated on GPUs here"
_HOURS_LIMIT = 24


def plan_lines(plan: Plan, price: float | None, *, faster: Found | None = None) -> list[str]:
    """Returns everything of one plan as lines of text.

    Args:
        plan: the plan.
        price: of a GPU-hour; None for no cost.
        faster: another layout that is worth a change; None for none.
    """
    return [
        *_heading(plan),
        "",
        *_parameter_lines(plan),
        "",
        *_memory_lines(plan),
        "",
        *_traffic_lines(plan),
        "",
        *_time_lines(plan, price),
        "",
        *_problem_lines(plan, faster),
    ]


def _heading(plan: Plan) -> list[str]:
    config, machine, layout = plan.config, plan.machine, plan.layout
    parallel, train = config.parallel, config.train
    dtype = "bf16" if plan.numerics.bytes == 2 else "fp32"
    pipeline = f"pipeline {parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        pipeline += f" x {parallel.virtual_pipeline} chunks"
    nodes = counted(machine.nodes, "node")
    return [
        f"{config.run.name} on {machine.gpus} {machine.gpu.name} ({nodes} of "
        f"{min(machine.gpus, machine.gpus_per_node)}), {dtype}",
        f"  tensor {parallel.tensor}, {pipeline}, context {parallel.context}, data {layout.data}; "
        f"experts: expert {parallel.expert}, tensor {parallel.expert_tensor}, "
        f"data {layout.expert_data}",
        f"  {counted(layout.num_microbatches, 'microbatch')} of {train.micro_batch_size} x "
        f"{train.seq_length} tokens a rank and step, recompute {train.recompute}",
    ]


def _row(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<36}{value:>16}  {remark}".rstrip()


def _parameter_lines(plan: Plan) -> list[str]:
    count = plan.parameters
    lines = [
        "parameters",
        _row("total", f"{count.total:,}"),
        _row("activated, gate counted", f"{count.activated_gate_counted:,}"),
        _row("activated, neurons only", f"{count.activated_neurons_only:,}"),
    ]
    if plan.vocabulary_padding:
        padding = f"{plan.vocabulary_padding:,}"
        lines.append(_row("padding of the vocabulary", padding, "not of the model; in memory only"))
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    worst = plan.worst
    state, stage = worst.state, worst.stage

    def gib(size: float, name: str, remark: str = "") -> str:
        return _row(name, f"{size / GIB:.2f} GiB", remark)

    lines = [
        f"memory of the worst rank, {worst.rank} ({worst.place})",
        gib(state.weights, "weights", f"{state.weights:,} bytes"),
        gib(state.gradients, "gradients, fp32", f"{state.gradients:,} bytes"),
        gib(state.masters, "fp32 masters", f"{state.masters:,} bytes"),
        gib(state.moments, "optimizer moments", f"{state.moments:,} bytes"),
        gib(stage.kept, "activations", f"passes in flight: {stage.in_flight}"),
    ]
    lines += [
        gib(size, f"  {name}")
        for name, size in sorted(stage.activations.items(), key=lambda item: -item[1])
        if size > stage.kept / 100
    ]
    details = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in stage.temporaries.items() if size
    )
    optimizer = worst.temporaries > sum(stage.temporaries.values())
    lines += [
        gib(worst.temporaries, "temporaries", "AdamW" if optimizer else details),
        gib(worst.reserve, "CUDA, NCCL, fragmentation", "assumed"),
        gib(worst.total, "peak", f"of {plan.machine.gpu.memory / GIB:.1f} GiB"),
    ]
    return lines


def _traffic_lines(plan: Plan) -> list[str]:
    lines = [f"communication, sent by rank {plan.worst.rank} in a step"]
    for item in plan.traffic:
        size = item.of_step(plan.layout)
        lines.append(
            _row(
                f"{item.group.name}: {item.operation}",
                f"{size / 1e9:.3f} GB",
                f"{item.group.size} ranks, "
                f"{item.group.in_node(plan.machine.gpus_per_node)} in a node",
            )
        )
    return lines if plan.traffic else [*lines, "  none"]


def _time_lines(plan: Plan, price: float | None) -> list[str]:
    time, flops = plan.time, plan.flops
    lines = [
        "operations a step",
        _row("ideal", f"{flops.ideal:.4e}", "only the kept neurons of up and down"),
        _row("realised", f"{flops.realised:.4e}", "what dense kernels do"),
        "",
        f"time ({PREDICTED})",
    ]
    for field in dataclasses.fields(time):
        seconds = getattr(time, field.name)
        if seconds > 0:
            share = f"{seconds / time.total:.1%}"
            lines.append(_row(f"  {field.name.replace('_', ' ')}", f"{seconds:.4g} s", share))
    lines += [
        _row("step", f"{time.total:.4g} s", f"{plan.tokens_per_step / time.total:,.0f} tokens/s"),
        _row("MFU", f"{plan.mfu(flops.realised):.1%}", f"{plan.mfu(flops.ideal):.1%} of ideal"),
        _row("tokens", f"{plan.tokens:,}", f"{plan.config.train.steps:,} steps"),
        _row("GPU-hours", f"{plan.gpu_hours:,.1f}", f"{plan.hours:,.1f} hours"),
    ]
    if price is not None:
        lines.append(_row("cost", f"{plan.gpu_hours * price:,.2f}", f"at {price:g} a GPU-hour"))
    return lines


def _problem_lines(plan: Plan, faster: Found | None) -> list[str]:
    lines = [f"problem: {line}" for line in problems(plan)]
    lines += [f"note: {line}" for line in notes(plan)]
    if faster is not None:
        layout = " ".join(text for text in faster.overrides if text.startswith("parallel."))
        share = f"{speed_up(faster.plan, plan):.0%}"
        lines.append(f"note: {layout} takes {share} less time (--search tries more)")
    return [*lines, "fits" if plan.fits else "does not fit"]


def search_lines(found: Sequence[Found], gpus: int, shown: int) -> list[str]:
    """Returns the best layouts of a search, one a line, ``shown`` of them at most."""
    gpu = found[0].plan.machine.gpu
    fitting = sum(item.plan.fits for item in found)
    lines = [
        f"{len(found)} layouts of {gpus} {gpu.name} are valid, {fitting} fit "
        f"{gpu.memory / GIB:.1f} GiB; times are {PREDICTED}",
        f"{'':>4} {'step, s':>9} {'MFU':>6} {'GiB':>7} {'fits':>5}  overrides",
    ]
    for place, item in enumerate(found[:shown], start=1):
        plan = item.plan
        lines.append(
            f"{place:>4} {plan.time.total:>9.4g} {plan.mfu(plan.flops.realised):>6.1%} "
            f"{plan.worst.total / GIB:>7.1f} {'yes' if plan.fits else 'no':>5}  "
            f"{' '.join(item.overrides)}"
        )
    return lines


def found_lines(best: Found, given: Plan | None) -> list[str]:
    """Returns a line on the best layout of a search beside the one that was asked for.

    Args:
        best: the first of the search.
        given: the plan of the command line's own layout; None when that is not valid.
    """
    if given is None:
        return ["the layout that was given is none of them"]
    if not given.fits:
        return ["the layout that was given does not fit"] if best.plan.fits else []
    share = speed_up(best.plan, given)
    if share > WORTH:
        return [f"the first takes {share:.0%} less time than the layout that was given"]
    return ["the layout that was given is within a tenth of the first"]


def match_lines(pair: Pair) -> list[str]:
    """Returns lines that say what is equal, and what was changed for it."""
    how = "exactly equal" if pair.difference == 0 else f"{pair.difference:.4%} apart"
    names = {
        "activated": "activated parameters (gate counted)",
        "flops": "ideal FLOPs a step",
        "total": "parameters in all",
    }
    return [
        f"{names[pair.count]}: {how}",
        _row("MoE", f"{pair.moe_value:,}"),
        _row("MoNE", f"{pair.mone_value:,}", f"mone.keep_ratio={pair.mone.mone.keep_ratio:g}"),
        f"changed: {pair.changed or 'nothing, the two are equal but for mone.enabled'}",
    ]


def launch_arguments(plan: Plan, overrides: Sequence[str], hours: int | None) -> list[str]:
    """Returns what launch/slurm.sh submits the run with; ``hours`` are 1.25 times the predicted, up
    to 24, unless given.
    """
    if hours is None:
        hours = min(_HOURS_LIMIT, int(plan.hours * 1.25) + 1)
    per_node = min(plan.machine.gpus, plan.machine.gpus_per_node)
    return [
        *("--nodes", str(plan.machine.nodes), "--gpus-per-node", str(per_node)),
        *("--time", f"{hours:02d}:00:00"),
        *overrides,
    ]


def plan_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """Returns one plan as a mapping for JSON: bytes, seconds and counts."""
    worst, time = plan.worst, plan.time
    return {
        "name": plan.config.run.name,
        "gpu": dataclasses.asdict(plan.machine.gpu),
        "gpus": plan.machine.gpus,
        "gpus_per_node": plan.machine.gpus_per_node,
        "assumed": dataclasses.asdict(plan.machine.assumed),
        "layout": dataclasses.asdict(plan.layout) | dataclasses.asdict(plan.config.parallel),
        "parameters": dataclasses.asdict(plan.parameters)
        | {"total": plan.parameters.total, "vocabulary_padding": plan.vocabulary_padding},
        "memory": {
            "rank": worst.rank,
            **dataclasses.asdict(worst.state),
            "activations": worst.stage.activations,
            "passes_in_flight": worst.stage.in_flight,
            "temporaries": worst.temporaries,
            "reserve": worst.reserve,
            "total": worst.total,
            "by_stage": [rank.total for rank in plan.stages],
        },
        "fits": plan.fits,
        "communication": [
            {
                "group": item.group.name,
                "ranks": item.group.size,
                "operation": item.operation,
                "bytes": item.of_step(plan.layout),
            }
            for item in plan.traffic
        ],
        "flops": dataclasses.asdict(plan.flops),
        "predicted": {
            "validated_on_gpus": False,
            "seconds": dataclasses.asdict(time) | {"total": time.total},
            "mfu": plan.mfu(plan.flops.realised),
            "mfu_of_ideal": plan.mfu(plan.flops.ideal),
            "gpu_hours": plan.gpu_hours,
            "cost": None if price is None else plan.gpu_hours * price,
        },
        "tokens": plan.tokens,
        "problems": problems(plan),
        "notes": notes(plan),
    }


def search_json(found: Sequence[Found], price: float | None) -> list[dict[str, Any]]:
    """Returns all layouts in their order, the best first, as mappings for JSON."""
    return [{"overrides": item.overrides, **plan_json(item.plan, price)} for item in found]


def match_json(pair: Pair) -> dict[str, Any]:
    """Returns the pair's counts as a mapping for JSON."""
    return {
        "count": pair.count,
        "moe": pair.moe_value,
        "mone": pair.mone_value,
        "difference": pair.difference,
        "changed": pair.changed,
    }


def experiment_yaml(base: str, changes: Mapping[str, Scalar], comment: str) -> str:
    """Returns a file for ``conf/experiment``: the experiment ``base`` with some keys changed."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    lines = [
        "# @package _global_",
        f"# {comment}",
        "defaults:",
        f"  - {base}",
        "  - _self_",
        "",
        *_yaml(tree, 0),
    ]
    return "\n".join(lines) + "\n"


def _yaml(tree: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}{name}:", *_yaml(value, depth + 1)]
        else:
            # JSON scalars and lists are YAML.
            lines.append(f"{'  ' * depth}{name}: {json.dumps(value)}")
    return lines


def changed_keys(base: Config, config: Config) -> dict[str, Any]:
    """Returns the dotted keys whose values in ``config`` differ from ``base``, with those values; a
    tuple is left as it is.
    """
    return dict(_differences(dataclasses.asdict(base), dataclasses.asdict(config), ""))


def _differences(
    base: Mapping[str, Any], other: Mapping[str, Any], prefix: str
) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in other.items():
        if isinstance(value, dict):
            found += _differences(base[name], value, f"{prefix}{name}.")
        elif value != base[name]:
            found.append((f"{prefix}{name}", value))
    return found
