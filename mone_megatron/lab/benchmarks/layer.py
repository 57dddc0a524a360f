"""Times one layer's experts, forward and backward: MoNE beside MoE and usual ways to select.

Shape suffixes: T rows (a token once for each of its experts), N tokens, K experts of a token, E
experts, F neurons of an expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import ops, reference, te_grouped
from mone_megatron.kernels.reference import Packed, TopK, WeightSums
from mone_megatron.lab.benchmarks.measure import Spread, finished, interleave, ratio
from mone_megatron.lab.benchmarks.select import topk_scatter

MOE = "MoE"
# Gate and up [T, F] each to hidden values [T, F], and a loss beside the output's or None.
Gate = Callable[[Tensor, Tensor, Packed | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class _Way:
    """Describes one way to compute the layer."""

    gate: Gate
    # Kept values of a row in packed memory mode; 0 for the full mode.
    packed_width: int = 0
    grouped_mm: Callable[[Tensor, Tensor, ops.RowGroups], Tensor] = ops.grouped_mm


@dataclass(frozen=True)
class LayerShape:
    """Holds the sizes of one layer's experts and how many tokens they are given.

    Raises:
        ValueError: for sizes that are not of a layer.
    """

    hidden: int
    neurons: int
    experts: int
    chosen: int
    tokens: int

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if min(self.hidden, self.neurons, self.experts, self.chosen, self.tokens) < 1:
            raise ValueError("--hidden, --neurons, --experts, --chosen, --tokens must be 1 or more")
        if self.chosen > self.experts:
            raise ValueError(
                f"--chosen: {self.chosen} of --experts={self.experts} cannot be chosen"
            )

    @property
    def training_flops(self) -> int:
        """Returns the FLOPs of three projections forward and backward, all neurons computed."""
        return 3 * 2 * 3 * self.tokens * self.chosen * self.hidden * self.neurons


@dataclass(frozen=True)
class LayerCost:
    """Holds the cost of one way to compute the layer.

    The ratio is over the MoE layer, which keeps all neurons.
    """

    name: str
    milliseconds: Spread
    over_moe: Spread
    # The same in processor time: of use when other processes take the cores.
    over_moe_processor: Spread
    tflops: float
    # Saved for the backward pass, without weights and the layer's input.
    saved_megabytes: float
    # MoE's over this one's.
    saved_times_smaller: float


@dataclass(frozen=True)
class LayerResult:
    """Holds the costs of all ways, for one shape and keep ratio."""

    shape: LayerShape
    keep_ratio: float
    dtype: str
    # Saved by all of them: the permuted rows.
    input_megabytes: float
    costs: list[LayerCost]


class _Layer:
    """Holds weights, permuted rows and gradients, the same for all ways."""

    def __init__(self, shape: LayerShape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int, std: float) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=dtype) * std

        rows = shape.tokens * shape.chosen
        self.gate_up = normal(
            shape.experts, 2 * shape.neurons, shape.hidden, std=shape.hidden**-0.5
        ).requires_grad_()
        self.down = normal(
            shape.experts, shape.neurons, shape.hidden, std=shape.neurons**-0.5
        ).requires_grad_()
        self.rows_TH = normal(rows, shape.hidden, std=1.0).requires_grad_()
        self.grad_TH = normal(rows, shape.hidden, std=1.0)
        self.probs_T = torch.rand(rows, generator=generator, device=device).requires_grad_()
        scores_NE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
        chosen_NK = scores_NE.topk(shape.chosen, dim=-1).indices
        self.expert_T = chosen_NK.flatten().sort().values
        counts_E = torch.bincount(self.expert_T, minlength=shape.experts)
        # Counts on the host, as after the alltoall dispatcher.
        self.groups = ops.RowGroups.of(counts_E.cpu(), counts_E.to(device))

    def forward(self, way: _Way) -> tuple[Tensor, Tensor | None]:
        """Returns the output ``[T, H]``, and a loss beside it, or None."""
        gate_up_TF = way.grouped_mm(self.rows_TH, self.gate_up.transpose(1, 2), self.groups)
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        packed = Packed(width=way.packed_width) if way.packed_width else None
        hidden_TF, extra = way.gate(gate_TF, up_TF, packed)
        del gate_up_TF, gate_TF, up_TF
        if packed is None:
            return way.grouped_mm(hidden_TF, self.down, self.groups), extra
        with ops.rebuilt_when_needed(hidden_TF, packed):
            return way.grouped_mm(hidden_TF, self.down, self.groups), extra

    def step(self, way: _Way) -> None:
        """Runs forward and backward; the gradients are thrown away."""
        output_TH, extra = self.forward(way)
        outputs, grads = [output_TH], [self.grad_TH]
        if extra is not None:
            outputs.append(extra)
            grads.append(torch.ones_like(extra))
        torch.autograd.grad(outputs, (self.rows_TH, self.gate_up, self.down, self.probs_T), grads)

    def saved_bytes(self, way: _Way) -> int:
        """Returns the bytes of the storages that autograd holds after the forward pass."""
        known = [self.rows_TH, self.gate_up, self.down, self.probs_T, self.expert_T]
        known.append(self.groups.ends_E)
        outside = {tensor.untyped_storage().data_ptr() for tensor in known}
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in outside:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # Referenced until the sum: a storage that is freed could be counted as another.
            output = self.forward(way)
        total = sum(held.values())
        del output
        return total


def _ways(layer: _Layer, shape: LayerShape, keep_ratio: float) -> dict[str, _Way]:
    keep = TopK(max(1, round(keep_ratio * shape.neurons)), "abs_activation")
    probs_T = layer.probs_T

    def moe(gate_TF: Tensor, up_TF: Tensor, _: Packed | None) -> tuple[Tensor, None]:
        return ops.selected_glu(gate_TF, up_TF, None, probs_T), None

    def selected(gate_TF: Tensor, up_TF: Tensor, packed: Packed | None) -> tuple[Tensor, None]:
        return ops.selected_glu(gate_TF, up_TF, keep, probs_T, packed=packed), None

    def balanced(gate_TF: Tensor, up_TF: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor]:
        sums = WeightSums(layer.expert_T, shape.experts, in_order=True)
        hidden_TF, weight_sum_SF, kept_SF = ops.selected_glu_and_sums(
            gate_TF, up_TF, keep, probs_T, sums, packed=packed
        )
        return hidden_TF, (weight_sum_SF * kept_SF).sum()

    def scattered(gate_TF: Tensor, up_TF: Tensor, _: Packed | None) -> tuple[Tensor, None]:
        mask_TF = topk_scatter(F.silu(gate_TF.detach()).abs(), keep.k)
        return reference.selected_glu(gate_TF, up_TF, mask_TF, probs_T), None

    threshold = _threshold(layer, shape, keep_ratio)

    def above(gate_TF: Tensor, up_TF: Tensor, _: Packed | None) -> tuple[Tensor, None]:
        mask_TF = F.silu(gate_TF.detach()).abs() > threshold
        return reference.selected_glu(gate_TF, up_TF, mask_TF, probs_T), None

    ways = {
        MOE: _Way(moe),
        "MoNE, selection alone": _Way(selected),
        "MoNE": _Way(balanced),
        "MoNE, packed memory": _Way(balanced, packed_width=keep.k),
        "torch.topk + scatter": _Way(scattered),
        "a fixed threshold": _Way(above),
    }
    if layer.rows_TH.is_cuda and te_grouped.have_transformer_engine():
        # Not run here.
        ways["MoNE, Transformer Engine's products"] = _Way(
            balanced,
            grouped_mm=lambda rows_TI, weight_EIO, groups: te_grouped.grouped_mm(
                rows_TI, weight_EIO, groups.counts_E
            ),
        )
    return ways


@torch.no_grad()
def _threshold(layer: _Layer, shape: LayerShape, keep_ratio: float) -> float:
    """Returns the |a| that ``keep_ratio`` of the neurons are above, from some of the rows."""
    gate_TF = layer.rows_TH[:256] @ layer.gate_up[0, : shape.neurons].T
    weights = F.silu(gate_TF).abs().float().flatten()
    return float(weights.kthvalue(max(1, round((1 - keep_ratio) * len(weights)))).values)


def measure_layer(
    shape: LayerShape,
    keep_ratio: float,
    *,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> LayerResult:
    """Times all ways interleaved, on the same rows, weights and gradients.

    "MoNE" is what training computes: selection and the balance loss's sums. The last two are what
    others do: selection alone, by masks in plain torch; a threshold keeps another number of
    neurons for each token.

    Args:
        shape: of the layer.
        keep_ratio: of the neurons.
        repeats: measurements of each.
        device: where.
        dtype: of weights and rows.

    Raises:
        ValueError: for a ratio outside (0, 1).
    """
    if not 0 < keep_ratio < 1:
        raise ValueError(f"--keep-ratio: {keep_ratio:g} is not in (0, 1)")
    layer = _Layer(shape, device, dtype)
    ways = _ways(layer, shape, keep_ratio)
    saved = {name: layer.saved_bytes(way) for name, way in ways.items()}
    calls = 5 if device.type == "cuda" else 1
    actions = {
        name: finished(partial(layer.step, way), device, calls=calls) for name, way in ways.items()
    }
    samples = interleave(actions, repeats=repeats, warmup=2)
    costs = []
    for name in ways:
        milliseconds = Spread.of([1e3 * once / calls for once in samples.clock[name]])
        costs.append(
            LayerCost(
                name=name,
                milliseconds=milliseconds,
                over_moe=ratio(samples.clock, name, MOE),
                over_moe_processor=ratio(samples.processor, name, MOE),
                tflops=shape.training_flops / milliseconds.median / 1e9,
                saved_megabytes=saved[name] / 1e6,
                saved_times_smaller=saved[MOE] / saved[name],
            )
        )
    rows = shape.tokens * shape.chosen
    input_megabytes = rows * shape.hidden * layer.rows_TH.element_size() / 1e6
    return LayerResult(shape, keep_ratio, str(dtype), input_megabytes, costs)
