"""What the model did in a step: auxiliary losses, and how experts and neurons were used.

Shape suffixes: A auxiliary losses, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from torch import Tensor, nn

from mone_megatron.config.schema import Config
from mone_megatron.config.validate import Layout
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
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS, NeuronGate
from mone_megatron.train.panel import LayerUse, Mlp, Panel, rounded

# Our key -> megatron-core's name of each auxiliary loss.
_ROUTER_LOSSES = {
    "aux_loss": ("router/load_balancing_loss", "load_balancing_loss"),
    "seq_aux_loss": ("router/seq_load_balancing_loss", "seq_load_balancing_loss"),
    "global_aux_loss": ("router/global_load_balancing_loss", "global_load_balancing_loss"),
}
_Z_LOSS = "z_loss"


class AuxiliaryLosses:
    """Reads megatron-core's tracker of per-layer losses, without their coefficients.

    The tracker is a process-wide global that each rank fills with its own layers and tokens. A
    step's true value is a sum over all ranks with the weight of each kind of loss, which rides
    along in the step's one collective.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        """Know which losses this configuration computes."""
        self.num_layers = config.model.num_layers
        per_stage = layout.data * layout.num_microbatches
        token_shards = config.parallel.tensor * config.parallel.context
        # (our key, tracker's name, weight of one rank's value)
        self.losses: list[tuple[str, str, float]] = []
        if config.model.num_experts:
            for kind, coeff in zip(
                config.model.router.balance, config.model.router.balance_coeff, strict=True
            ):
                if kind in _ROUTER_LOSSES and coeff > 0:
                    key, name = _ROUTER_LOSSES[kind]
                    # Ranks hold parts of a sum over a microbatch, or over the global batch.
                    count = layout.num_microbatches if kind == "global_aux_loss" else per_stage
                    self.losses.append((key, name, 1 / count))
            if config.model.router.z_loss_coeff > 0:
                # Ranks hold means over their tokens.
                self.losses.append(("router/z_loss", _Z_LOSS, 1 / (per_stage * token_shards)))
        if config.mone.enabled:
            self.losses.append(("mone/balance_loss", NEURON_BALANCE_LOSS, 1 / per_stage))

    def read(self, device: torch.device) -> Tensor:
        """This rank's weighted values, flattened ``[A * L]``, and start counting anew."""
        tracker = get_moe_layer_wise_logging_tracker()
        values_AL = torch.zeros(len(self.losses), self.num_layers, device=device)
        for row, (_, name, weight) in enumerate(self.losses):
            if name in tracker:
                values_AL[row] = tracker[name]["values"].float() * weight
        clear_aux_losses_tracker()
        return values_AL.flatten()

    def metrics(self, summed: Tensor, *, per_layer: bool) -> dict[str, float]:
        """Mean over the layers that compute it, and with ``per_layer`` each layer's value."""
        metrics: dict[str, float] = {}
        values_AL = summed.view(len(self.losses), self.num_layers)
        for (key, _, _), values_L in zip(self.losses, values_AL, strict=True):
            used = [i for i, value in enumerate(values_L.tolist()) if value != 0.0]
            if not used:
                continue
            metrics[key] = float(values_L[used].mean())
            if per_layer:
                metrics |= {f"{key}/layer_{i + 1}": float(values_L[i]) for i in used}
        return metrics


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
    """What a panel step found: numbers of layers for its record, and every expert."""

    metrics: dict[str, float]
    panel: Panel


class UtilisationPanel:
    """Expert and neuron use of every layer, on the steps that log it."""

    def __init__(self, config: Config, chunks: Iterable[nn.Module]) -> None:
        """Find the modules that count."""
        self.num_layers = config.model.num_layers
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

    @property
    def counting_seconds(self) -> float:
        """Time that counting took this rank since :meth:`collect`."""
        return sum(gate.usage.seconds for _, gate in self.gates)

    def collect(self, wanted: bool) -> None:
        """Count during the next forward passes, or not."""
        for _, gate in self.gates:
            gate.usage.reset()
            gate.usage.collecting = wanted

    def forget(self) -> None:
        """Training went back to an earlier state: the next panel has none before it."""
        for _, gate in self.gates:
            gate.usage.forget()

    def read(self, record: Mapping[str, float], device: torch.device) -> PanelReading:
        """What was counted. Collective; equal on every rank.

        Args:
            record: the step's, with the balance losses of its layers.
            device: where to add.
        """
        metrics: dict[str, float] = {}
        uses: list[LayerUse] = []
        for mlp in self.mlps:
            usages = {}
            for gate_mlp, gate in self.gates:
                if gate_mlp == mlp:
                    assert gate.layer_number is not None
                    usages[gate.layer_number - 1] = gate.usage
            tables, present = summarise(
                usages,
                rows=self.num_layers,
                num_experts=self.num_experts[mlp],
                neuron_ranks=self.neuron_ranks[mlp],
                device=device,
            )
            layers = [index + 1 for index in present.nonzero().flatten().tolist()]
            metrics |= _by_layer(mlp, tables, layers, self.selecting[mlp])
            uses += [_layer_use(mlp, layer, tables[layer - 1], record) for layer in layers]
        return PanelReading(metrics, Panel(int(record["step"]), tuple(uses)))


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
                key = key.replace("mone/", f"mone/{mlp}/")
            metrics[f"{key}/layer_{layer}"] = value
            collected.setdefault(key, []).append(value)
    return metrics | {key: sum(values) / len(values) for key, values in collected.items()}
