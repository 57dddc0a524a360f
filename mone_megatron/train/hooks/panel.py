"""How experts and neurons were used in a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mone_megatron.config.mone import metrics_of
from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.mone.chunk_unions import CHUNK_LENGTHS, summarise_unions
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.metrics import (
    DEAD_SHARE,
    KEPT_ACTIVATION,
    LOAD_BALANCE,
    LOAD_ENTROPY,
    LOAD_OVERLAP,
    MASS_KEPT,
    MAX_OVER_MEAN,
    TOKENS,
    expert_metrics,
    summarise,
)
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert
from mone_megatron.mone.neurons import NeuronGate
from mone_megatron.train.hooks.due import is_due
from mone_megatron.train.panel import LayerUse, Mlp, Panel, rounded

_MLPS: tuple[Mlp, ...] = ("routed", "shared", "dense")
# Names of the statistics of an expert in panel.jsonl; those of layers are mone/NAME.
_STATISTICS = {
    "load_entropy": LOAD_ENTROPY,
    "dead_neuron_share": DEAD_SHARE,
    "load_max_over_mean": MAX_OVER_MEAN,
    "mass_kept": MASS_KEPT,
    "load_balance": LOAD_BALANCE,
    "kept_activation": KEPT_ACTIVATION,
    "load_overlap": LOAD_OVERLAP,
}


def _mlp(parent: nn.Module) -> Mlp | None:
    if isinstance(parent, GroupedExperts):
        return "routed"
    if isinstance(parent, NeuronSharedExpert):
        return "shared"
    if isinstance(parent, NeuronMLP):
        return "dense"
    return None


@dataclass(frozen=True)
class PanelReading:
    """Holds what a panel step found: numbers of layers for its record, and every expert."""

    metrics: dict[str, float]
    panel: Panel


class PanelHook(Hook):
    """Records how experts and neurons of every layer were used, on the steps that look at them.

    Those are every ``logging.layer_interval``-th step and the last. Collective over all ranks.
    """

    def __init__(
        self,
        config: Config,
        chunks: Iterable[nn.Module],
        device: torch.device,
        show: Callable[[Panel], None] | None = None,
    ) -> None:
        """Finds the modules that count.

        Args:
            config: validated.
            chunks: this rank's part of the model.
            device: where to add over ranks.
            show: is given each panel; None on the ranks that show nothing.
        """
        self.device = device
        self.show = show
        self.interval, self.last = config.logging.layer_interval, config.train.steps
        self.num_layers = config.model.num_layers + config.model.mtp.depth
        self.num_experts = {"routed": config.model.num_experts, "shared": 1, "dense": 1}
        # Ranks that share the neurons of an expert.
        self.neuron_ranks = {
            "routed": config.parallel.expert_tensor,
            "shared": config.parallel.tensor,
            "dense": config.parallel.tensor,
        }
        self.selecting = {mlp: config.mone.enabled and mlp in config.mone.apply_to for mlp in _MLPS}
        self.gates: list[tuple[Mlp, NeuronGate]] = []
        for chunk in chunks:
            for module in chunk.modules():
                mlp = _mlp(module)
                if mlp is not None:
                    self.gates.append((mlp, module.neuron_gate))  # type: ignore[arg-type]
        self.mlps = [
            mlp
            for mlp in _MLPS
            if (mlp == "routed" and config.model.num_experts) or self.selecting[mlp]
        ]

    def before_step(self, step: int) -> None:
        """Counts during the step's forward passes, if it is one that looks."""
        self.collect(is_due(step, self.interval, self.last))

    def record(self, report: StepReport) -> Record:
        """Returns the numbers of layers, and shows the panel."""
        if not is_due(report.step, self.interval, self.last):
            return {}
        counting = sum(gate.usage.seconds for _, gate in self.gates)
        began = time.perf_counter()
        reading = self.read(report.step, report.record)
        if self.show is not None:
            self.show(reading.panel)
        seconds = counting + time.perf_counter() - began
        return reading.metrics | {"panel_seconds": seconds}

    def on_rollback(self, step: int) -> None:
        """Forgets what was counted: the next panel has none before it."""
        for _, gate in self.gates:
            gate.usage.forget()

    def collect(self, wanted: bool) -> None:
        """Counts during the next forward passes, or not."""
        for _, gate in self.gates:
            gate.usage.reset()
            gate.unions.reset()
            gate.usage.collecting = wanted

    def read(self, step: int, record: Mapping[str, float]) -> PanelReading:
        """Returns what was counted. Collective; equal on every rank.

        Args:
            step: from 1.
            record: the step's, with the balance losses of its layers.
        """
        metrics: dict[str, float] = {}
        uses: list[LayerUse] = []
        for mlp in self.mlps:
            usages, unions = {}, {}
            for gate_mlp, gate in self.gates:
                if gate_mlp == mlp:
                    assert gate.layer_number is not None
                    usages[gate.layer_number - 1] = gate.usage
                    unions[gate.layer_number - 1] = gate.unions
            tables, present = summarise(
                usages,
                rows=self.num_layers,
                num_experts=self.num_experts[mlp],
                neuron_ranks=self.neuron_ranks[mlp],
                device=self.device,
            )
            layers = [layer for layer, there in enumerate(present.tolist(), start=1) if there]
            metrics |= _by_layer(mlp, tables, layers, self.selecting[mlp])
            if self.selecting[mlp]:
                shares = summarise_unions(unions, rows=self.num_layers, device=self.device)
                metrics |= _unions_by_layer(mlp, shares, layers)
            uses += [_layer_use(mlp, layer, tables[layer - 1], record) for layer in layers]
        return PanelReading(metrics, Panel(step, tuple(uses)))


def _layer_use(mlp: Mlp, layer: int, table: Tensor, record: Mapping[str, float]) -> LayerUse:
    tokens = table[:, TOKENS].tolist()
    experts = {"tokens": tuple(tokens)}
    balance_loss = None
    if table[:, MAX_OVER_MEAN].any():  # else nothing was selected
        for name, column in _STATISTICS.items():
            values = zip(tokens, table[:, column].tolist(), strict=True)
            experts[name] = tuple(rounded(value) if some else math.nan for some, value in values)
        loss = record.get(f"mone/balance_loss/layer_{layer}")
        balance_loss = None if loss is None or not math.isfinite(loss) else rounded(loss)
    return LayerUse(mlp, layer, experts, balance_loss)


def _by_layer(
    mlp: Mlp, tables: Tensor, layers: Sequence[int], with_neurons: bool
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    collected: dict[str, list[float]] = {}
    for layer in layers:
        for key, value in expert_metrics(tables[layer - 1], with_neurons=with_neurons).items():
            if mlp != "routed":
                if key.startswith("router/"):
                    continue
                key = key.replace("mone/", f"{metrics_of(mlp)}/")
            metrics[f"{key}/layer_{layer}"] = value
            collected.setdefault(key, []).append(value)
    return metrics | {key: sum(values) / len(values) for key, values in collected.items()}


def _unions_by_layer(mlp: Mlp, shares: Tensor, layers: Sequence[int]) -> dict[str, float]:
    """Returns the share of a layer's neurons that chunks keep, and its means over layers."""
    metrics: dict[str, float] = {}
    for place, length in enumerate(CHUNK_LENGTHS):
        known = {layer: shares[layer - 1, place].item() for layer in layers}
        known = {layer: share for layer, share in known.items() if not math.isnan(share)}
        key = f"{metrics_of(mlp)}/chunk_union_{length}"
        metrics |= {f"{key}/layer_{layer}": share for layer, share in known.items()}
        if known:
            metrics[key] = sum(known.values()) / len(known)
    return metrics
