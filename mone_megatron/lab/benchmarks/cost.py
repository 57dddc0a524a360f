"""Measures what neuron selection adds to a training step: whole steps, then the parts apart."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from mone_megatron.config.schema import Config
from mone_megatron.lab.benchmarks.experiments import OpenExperiment, open_experiments, step_action
from mone_megatron.lab.benchmarks.measure import Spread, difference, finished, interleave, ratio
from mone_megatron.mone.balance import NeuronBalance
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.neurons import NeuronGate, NeuronSettings, Segments
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.parallel.groups import close_groups
from mone_megatron.train.hooks.panel import PanelHook
from mone_megatron.train.hooks.panel_files import PanelFilesHook

_COUNTING = "layer metrics, when logged: counting"
_READING = "layer metrics, when logged: ranks, files, alerts"


@dataclass(frozen=True)
class Part:
    """Holds the time of one part of what MoNE adds."""

    name: str
    milliseconds_per_step: Spread
    # Of the MoE step's median.
    share_of_step: float


@dataclass(frozen=True)
class Cost:
    """Holds what neuron selection costs, as measured on one rank."""

    hardware: str
    step_ratio: Spread
    # The same in processor time: of use when other processes take the cores.
    step_processor_ratio: Spread
    moe_step_seconds: Spread
    mone_step_seconds: Spread
    parts: list[Part]
    # What all of the layer metrics take on average, logged every so many steps, of a MoE step.
    layer_interval: int
    panel_share_of_step: float
    # Rows and neurons that the parts were timed on.
    rows: int
    neurons: int


@dataclass(frozen=True)
class _GateInputs:
    """Holds what one layer's NeuronGate was called with in a real step."""

    gate_up_TF: Tensor
    scale_T: Tensor
    segments: Segments


def measure_cost(moe: Config, mone: Config, *, repeats: int, part_repeats: int) -> Cost:
    """Times steps of two experiments that differ in ``mone`` only, interleaved, on this rank.

    Collective over the default process group.

    Args:
        moe: the baseline, from :func:`mone_megatron.lab.benchmarks.ranks.prepare`.
        mone: the same with neuron selection.
        repeats: measured steps of each.
        part_repeats: measurements of each part.
    """
    sessions = open_experiments([moe, mone], steps_in_memory=4)
    steps = [step_action(session) for session in sessions]
    samples = interleave(
        {"moe": lambda: next(steps[0]), "mone": lambda: next(steps[1])}, repeats=repeats, warmup=3
    )
    moe_seconds = Spread.of(samples.clock["moe"])
    inputs = _capture(sessions[1], lambda: next(steps[1]))
    reading = _reading(sessions[1], lambda: next(steps[1]), part_repeats)
    parts = _parts(sessions[1], inputs, reading, moe_seconds.median, part_repeats)
    panel = sum(part.share_of_step for part in parts if part.name in (_COUNTING, _READING))
    interval = mone.logging.layer_interval
    result = Cost(
        hardware=sessions[0].device.hardware,
        step_ratio=ratio(samples.clock, "mone", "moe"),
        step_processor_ratio=ratio(samples.processor, "mone", "moe"),
        moe_step_seconds=moe_seconds,
        mone_step_seconds=Spread.of(samples.clock["mone"]),
        parts=parts,
        layer_interval=interval,
        panel_share_of_step=panel / interval if interval else 0.0,
        rows=inputs.gate_up_TF.shape[0],
        neurons=inputs.gate_up_TF.shape[1] // 2,
    )
    close_groups()
    return result


def _experts(session: OpenExperiment) -> list[GroupedExperts]:
    modules = [module for chunk in session.state.chunks for module in chunk.modules()]
    return [module for module in modules if isinstance(module, GroupedExperts)]


def _capture(session: OpenExperiment, step: Callable[[], None]) -> _GateInputs:
    """Runs a step and returns the inputs of its first layer's gate, in the last microbatch."""
    seen: list[_GateInputs] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        gate_TF, up_TF, scale_T, segments, *_ = inputs
        gate_up_TF = torch.cat([gate_TF, up_TF], dim=-1).detach()
        seen.append(_GateInputs(gate_up_TF, scale_T.detach().clone(), segments))

    handle = _experts(session)[0].neuron_gate.register_forward_pre_hook(keep)
    step()
    handle.remove()
    return seen[-1]


def _reading(session: OpenExperiment, step: Callable[[], None], repeats: int) -> Spread:
    """Returns the seconds to add up over ranks, write and judge what a step counted."""
    panel = PanelHook(session.config, session.state.chunks, session.device.torch_device)
    panel.collect(True)
    step()
    with tempfile.TemporaryDirectory() as folder:
        hook = PanelFilesHook(session.config, Path(folder), step=0, stream=io.StringIO())
        hook.on_start()
        actions = {"read": lambda: hook.add(panel.read(1, {}).panel)}
        seconds = interleave(actions, repeats=repeats, warmup=3).clock["read"]
        hook.on_end("completed")
    panel.collect(False)
    return Spread.of(seconds)


def _parts(
    session: OpenExperiment, inputs: _GateInputs, reading: Spread, step_seconds: float, repeats: int
) -> list[Part]:
    settings = session.config.mone
    selection = NeuronSelection(
        settings.keep_ratio, settings.score, settings.rule, settings.rule_options
    )
    silent = NeuronBalance(coeff=0.0)
    balance = NeuronBalance(
        settings.balance.coeff or 0.01,
        settings.balance.kind,
        settings.balance.weights,
        settings.balance.normalize,
    )
    gates = {
        "plain": _gate(session, None),
        "selected": _gate(session, NeuronSettings(selection, silent)),
        "balanced": _gate(session, NeuronSettings(selection, balance)),
        "counted": _gate(session, NeuronSettings(selection, balance)),
    }
    gates["counted"].usage.collecting = True
    actions: dict[str, Callable[[], object]] = {
        name: _forward_backward(gate, inputs) for name, gate in gates.items()
    }
    selector = gates["selected"].selector
    assert selector is not None
    gate_TF, up_TF = inputs.gate_up_TF.chunk(2, dim=-1)
    device = session.device.torch_device
    actions["selection"] = finished(lambda: selector(gate_TF, up_TF), device, calls=1)
    seconds = interleave(actions, repeats=repeats, warmup=10).clock
    calls = len(_experts(session)) * session.layout.num_microbatches

    def part(name: str, once: Spread, calls: int = calls) -> Part:
        spread = Spread(*(1e3 * calls * value for value in vars(once).values()))
        return Part(name, spread, calls * once.median / step_seconds)

    return [
        part("SwiGLU without selection", Spread.of(seconds["plain"])),
        part("selection: scores and mask", Spread.of(seconds["selection"])),
        part(
            "selection, with SwiGLU at the kept neurons", difference(seconds, "selected", "plain")
        ),
        part("balance loss, forward and backward", difference(seconds, "balanced", "selected")),
        part(_COUNTING, difference(seconds, "counted", "balanced")),
        part(_READING, reading, calls=1),
    ]


def _gate(session: OpenExperiment, settings: NeuronSettings | None) -> NeuronGate:
    experts = _experts(session)[0]
    gate = NeuronGate(
        config=get_model_config(session.state.chunks[0]),
        settings=settings,
        neurons=session.config.model.expert_ffn_hidden_size,
        num_experts=session.config.model.num_experts,
        num_local_experts=experts.num_local_experts,
        first_expert=0,
        neuron_group=parallel_state.get_expert_tensor_parallel_group(),
        replica_group=parallel_state.get_expert_data_parallel_group(),
    )
    gate.layer_number = 1
    return gate


def _forward_backward(gate: NeuronGate, inputs: _GateInputs) -> Callable[[], object]:
    gate_up_TF = inputs.gate_up_TF.clone().requires_grad_()
    scale_T = inputs.scale_T.clone().requires_grad_()
    grad_TF = torch.randn_like(gate_up_TF[:, : gate_up_TF.shape[1] // 2])

    def run() -> object:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        hidden_TF = gate(gate_TF, up_TF, scale_T, inputs.segments)
        return torch.autograd.grad(hidden_TF, [gate_up_TF, scale_T], grad_TF)

    return finished(run, gate_up_TF.device, calls=1)
