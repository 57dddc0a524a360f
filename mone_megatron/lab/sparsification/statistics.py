"""Describes a layer's activations: thresholds, a histogram, the spread of |a| over a token's ranks.

They are counted in fixed buckets, so that any amount of text takes the same memory: a bucket is one
value of fp32's exponent and leading mantissa bits, 2^-11 (0.05%) wide, and every bf16 value begins
one.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mone_megatron.lab.sparsification.plans import kept_neurons
from mone_megatron.lab.sparsification.ranking import Rows
from mone_megatron.report.identified import Doubt

# Buckets cover magnitudes from 2^-44 (anything smaller is in the first) to 2^20.
_MANTISSA_BITS = 11
_LOWEST_EXPONENT, _EXPONENTS = -44, 64
_BUCKETS = _EXPONENTS << _MANTISSA_BITS
_DROPPED_BITS = 23 - _MANTISSA_BITS
_FIRST = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS
# Bins of the histogram that is written and drawn: eight to a doubling of |a|.
_BIN_BITS = 3
# Ranks that the mass is written for.
_RANKS = 256


@dataclass(frozen=True)
class Threshold:
    """Holds the |a| that the largest ``top`` of the activations exceed.

    Attributes:
        top: a share.
        pooled: the |a| above which that share of all (token, neuron) pairs of the layer lies.
        per_token: the mean, over tokens and their experts, of the smallest |a| that a token keeps
            when it keeps that share of an expert's neurons.
    """

    top: float
    pooled: float
    per_token: float

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """Returns why it is not that of the activations: it lies at the edge of what is counted."""
        found = []
        if self.pooled <= _edge(0):
            found.append(Doubt("bound", f"fewer than {self.top:.3g} of the activations are above "
                               f"{_edge(0):.1g}, the least that is counted"))  # fmt: skip
        elif self.pooled >= _edge(_BUCKETS - 1):
            found.append(Doubt("bound", f"more than {self.top:.3g} of the activations are above "
                               f"{_edge(_BUCKETS - 1):.3g}, the most that is counted"))  # fmt: skip
        return tuple(found)


@dataclass(frozen=True)
class LayerStatistics:
    """Holds the activations of one kind of neurons in one layer.

    Attributes:
        layer: from 0.
        target: ``routed``, ``shared`` or ``dense``.
        neurons: of one expert.
        tokens: seen.
        rows: tokens times experts of a token.
        thresholds: one for each share asked for.
        edges: ``[bins + 1]``, ascending magnitudes; the first bin holds all below it, too.
        positive, negative: ``[bins]``, how often a is in a bin.
        ranks: ``[r]``, shares of the neurons, ascending to 1.
        mass: ``[r]``, the share of a token's sum of |a| that its largest ``ranks`` hold.
    """

    layer: int
    target: str
    neurons: int
    tokens: int
    rows: int
    thresholds: tuple[Threshold, ...]
    edges: tuple[float, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    ranks: tuple[float, ...]
    mass: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the statistics for a results file."""
        content = dict(vars(self))
        content["thresholds"] = [vars(threshold) for threshold in self.thresholds]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerStatistics:
        """Returns the statistics that a results file holds."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        fields["thresholds"] = tuple(Threshold(**entry) for entry in content["thresholds"])
        return cls(**fields)


class Observer:
    """Counts the activations of one place and keeps all neurons; it is a ``ranking.Choose``."""

    def __init__(self, layer: int, target: str, neurons: int, device: torch.device) -> None:
        self._layer, self._target, self._neurons = layer, target, neurons
        self._rows = 0
        self._counts = torch.zeros(2, _BUCKETS, dtype=torch.int64, device=device)
        self._sorted_F = torch.zeros(neurons, dtype=torch.float64, device=device)
        self._mass_F = torch.zeros(neurons, dtype=torch.float64, device=device)

    def __call__(self, rows: Rows) -> None:
        """Counts some rows.

        Raises:
            ValueError: an activation that is not finite.
        """
        assert rows.activate is not None, "only places that define |a| are observed"
        a_TF = rows.activate(rows.gate_TF).float()
        if not a_TF.isfinite().all():
            raise ValueError(f"layer {self._layer}: activations that are not finite")
        magnitude_TF = a_TF.abs()
        bits_TF = magnitude_TF.view(torch.int32) >> _DROPPED_BITS
        bucket_TF = (bits_TF - _FIRST).clamp(0, _BUCKETS - 1)
        bucket_TF = bucket_TF + (a_TF < 0).int() * _BUCKETS
        counts = torch.bincount(bucket_TF.flatten(), minlength=2 * _BUCKETS)
        self._counts += counts.view(2, _BUCKETS)
        sorted_TF = magnitude_TF.sort(dim=-1, descending=True).values
        self._sorted_F += sorted_TF.sum(dim=0, dtype=torch.float64)
        sums_T1 = sorted_TF.sum(dim=-1, keepdim=True)
        # A token whose activations are all zero has no mass to spread.
        self._mass_F += torch.where(sums_T1 > 0, sorted_TF / sums_T1, 0).sum(
            dim=0, dtype=torch.float64
        )
        self._rows += len(a_TF)

    def statistics(self, tops: Sequence[float], tokens: int) -> LayerStatistics:
        """Returns the statistics of everything that was seen.

        ``tokens`` is how many went through the layer.

        Raises:
            ValueError: nothing was seen.
        """
        if not self._rows:
            raise ValueError(f"layer {self._layer}: no token reached its {self._target} neurons")
        counts = self._counts.cpu().numpy()
        mean_F = (self._sorted_F / self._rows).cpu().numpy()
        mass = np.cumsum((self._mass_F / self._rows).cpu().numpy())
        places = np.unique(np.linspace(0, self._neurons - 1, _RANKS).round().astype(int))
        first, bins = _bins(counts)
        return LayerStatistics(
            layer=self._layer,
            target=self._target,
            neurons=self._neurons,
            tokens=tokens,
            rows=self._rows,
            thresholds=tuple(
                Threshold(
                    top,
                    _quantile(counts.sum(axis=0), top),
                    float(mean_F[kept_neurons(1 - top, self._neurons) - 1]),
                )
                for top in tops
            ),
            edges=tuple(_edge((first + bin_) << _shift()) for bin_ in range(bins.shape[1] + 1)),
            positive=tuple(bins[0].tolist()),
            negative=tuple(bins[1].tolist()),
            ranks=tuple(((places + 1) / self._neurons).tolist()),
            mass=tuple(mass[places].tolist()),
        )


def _shift() -> int:
    return _MANTISSA_BITS - _BIN_BITS


def _edge(bucket: int) -> float:
    """Returns the smallest magnitude of a bucket."""
    exponent, mantissa = divmod(bucket, 1 << _MANTISSA_BITS)
    return float((1 + mantissa / (1 << _MANTISSA_BITS)) * 2.0 ** (exponent + _LOWEST_EXPONENT))


def _quantile(counts: npt.NDArray[np.int64], top: float) -> float:
    """Returns the bucket's edge that the largest ``top`` of everything counted are not below."""
    from_above = np.cumsum(counts[::-1])
    wanted = max(1, round(top * int(from_above[-1])))
    return _edge(_BUCKETS - 1 - int(np.searchsorted(from_above, wanted)))


def _bins(counts: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64]]:
    """Returns the first bin that is not empty, and the counts ``[2, n]`` from it on.

    They end with the last bin that is not empty.
    """
    bins = counts.reshape(2, -1, 1 << _shift()).sum(axis=2)
    used = np.flatnonzero(bins.sum(axis=0))
    first, last = int(used[0]), int(used[-1])
    return first, bins[:, first : last + 1]
