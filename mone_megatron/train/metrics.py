"""What the model did in a step: auxiliary losses, and how experts and neurons were used.

Shape suffixes: A auxiliary losses, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from torch import Tensor, nn

from mone_megatron.config.schema import Config
from mone_megatron.config.validate import Layout
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.metrics import NUM_COLUMNS, expert_metrics
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS, NeuronGate

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


def _kind(parent: nn.Module) -> str | None:
    if isinstance(parent, GroupedExperts):
        return "routed"
    if isinstance(parent, NeuronSharedExpert):
        return "shared"
    if isinstance(parent, NeuronMLP):
        return "dense"
    return None


class UtilisationPanel:
    """Expert and neuron use of every layer, on the steps that log it."""

    def __init__(self, config: Config, chunks: Iterable[nn.Module]) -> None:
        """Find the modules that count."""
        self.num_layers = config.model.num_layers
        self.num_experts = {"routed": config.model.num_experts, "shared": 1, "dense": 1}
        self.selecting = {
            kind: config.mone.enabled and kind in config.mone.apply_to
            for kind in ("routed", "shared", "dense")
        }
        self.gates: list[tuple[str, NeuronGate]] = []
        for chunk in chunks:
            for module in chunk.modules():
                kind = _kind(module)
                if kind is not None:
                    self.gates.append((kind, module.neuron_gate))  # type: ignore[arg-type]
        self.kinds = [
            kind
            for kind in ("routed", "shared", "dense")
            if (kind == "routed" and config.model.num_experts) or self.selecting[kind]
        ]

    def collect(self, wanted: bool) -> None:
        """Count during the next forward passes, or not."""
        for _, gate in self.gates:
            gate.usage.reset()
            gate.usage.collecting = wanted

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Numbers per layer and their means over layers. Collective; equal on every rank."""
        metrics: dict[str, float] = {}
        for kind in self.kinds:
            shape = (self.num_layers, self.num_experts[kind], NUM_COLUMNS)
            tables = torch.zeros(shape, dtype=torch.float64, device=device)
            present = torch.zeros(self.num_layers, device=device)
            for gate_kind, gate in self.gates:
                if gate_kind == kind:
                    assert gate.layer_number is not None
                    tables[gate.layer_number - 1] = gate.usage.summary(device)
                    present[gate.layer_number - 1] = 1
            if kind == "routed":
                dist.all_reduce(tables, group=parallel_state.get_expert_model_parallel_group())
            dist.all_reduce(tables, group=parallel_state.get_pipeline_model_parallel_group())
            dist.all_reduce(present, group=parallel_state.get_pipeline_model_parallel_group())
            metrics |= _by_layer(kind, tables.cpu(), present.cpu(), self.selecting[kind])
        return metrics


def _by_layer(kind: str, tables: Tensor, present: Tensor, with_neurons: bool) -> dict[str, float]:
    metrics: dict[str, float] = {}
    collected: dict[str, list[float]] = {}
    for layer in present.nonzero().flatten().tolist():
        for key, value in expert_metrics(tables[layer], with_neurons=with_neurons).items():
            if kind != "routed":
                if key.startswith("router/"):
                    continue
                key = key.replace("mone/", f"mone/{kind}/")
            metrics[f"{key}/layer_{layer + 1}"] = value
            collected.setdefault(key, []).append(value)
    return metrics | {key: sum(values) / len(values) for key, values in collected.items()}
