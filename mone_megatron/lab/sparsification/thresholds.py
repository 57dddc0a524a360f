"""Sets thresholds of scores on calibration text, so that a wanted share of the neurons is below.

The scores of a place are counted in fixed buckets, one for each sign, exponent and leading mantissa
bits of fp32: any amount of text takes the same memory. A threshold is the lower edge of a bucket,
which lies at most 2^-9 (0.2%) of its size from the exact quantile.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, G groups
that have a threshold each, B buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mone_megatron.lab.sparsification.plans import kept_neurons
from mone_megatron.lab.sparsification.ranking import Rows, score_rows

_MANTISSA_BITS = 9
_DROPPED_BITS = 23 - _MANTISSA_BITS
# Exponents from 2^-44 (anything smaller counts as it) to 2^20, of each sign.
_LOWEST_EXPONENT, _EXPONENTS = -44, 64
_MAGNITUDES = _EXPONENTS << _MANTISSA_BITS
_FIRST = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS
_BUCKETS = 2 * _MAGNITUDES


def bucket_of(values: Tensor) -> Tensor:
    """Returns the number of each value's bucket, int64, in the order of the values.

    Args:
        values: fp32, any shape; -inf is in the lowest bucket.
    """
    bits = values.abs().contiguous().view(torch.int32) >> _DROPPED_BITS
    magnitude = (bits - _FIRST).clamp(0, _MAGNITUDES - 1).long()
    return torch.where(values < 0, _MAGNITUDES - 1 - magnitude, _MAGNITUDES + magnitude)


def edge_of(bucket: int) -> float:
    """Returns a number that every value of a bucket is above, or equal to and no value below is.

    What is counted together with zero has zero as its edge.
    """
    if bucket == _MAGNITUDES:
        return 0.0
    place = bucket - _MAGNITUDES if bucket > _MAGNITUDES else _MAGNITUDES - bucket
    exponent, mantissa = divmod(place, 1 << _MANTISSA_BITS)
    size = float((1 + mantissa / (1 << _MANTISSA_BITS)) * 2.0 ** (exponent + _LOWEST_EXPONENT))
    return size if bucket > _MAGNITUDES else -size


class ScoreCounts:
    """Counts the scores of one place and keeps all neurons; it is a ``ranking.Choose``."""

    def __init__(self, score: str, layer: int, groups: int) -> None:
        """Begins with nothing counted.

        Args:
            score: what is counted.
            layer: for messages, from 0.
            groups: 1 to count all experts together, or their number to count each by itself.
        """
        self._score, self._layer = score, layer
        self._counts_GB = torch.zeros(groups, _BUCKETS, dtype=torch.int64)

    def __call__(self, rows: Rows) -> None:
        """Counts some rows; neurons that the model itself leaves out are the lowest.

        Raises:
            ValueError: a score that is not a number.
        """
        scores_TF = score_rows(self._score, rows).float()
        if scores_TF.isnan().any():
            raise ValueError(f"layer {self._layer}: scores that are not numbers")
        if rows.own_TF is not None:
            scores_TF = scores_TF.masked_fill(~rows.own_TF, -torch.inf)
        bucket_TF = bucket_of(scores_TF)
        groups = len(self._counts_GB)
        if groups > 1:
            bucket_TF = bucket_TF + rows.expert_T.unsqueeze(-1) * _BUCKETS
        counts = torch.bincount(bucket_TF.flatten(), minlength=groups * _BUCKETS)
        self._counts_GB += counts.view(groups, _BUCKETS).cpu()

    def thresholds(self, share: float, neurons: int) -> tuple[float, ...]:
        """Returns the threshold of each group that ``share`` of its scores are not above.

        Args:
            share: of the neurons that is to go. In whole neurons of an expert, as ranks have it.
            neurons: of an expert.

        Raises:
            ValueError: no token reached a group.
        """
        wanted = 1 - kept_neurons(share, neurons) / neurons
        return tuple(self._threshold(group, wanted) for group in range(len(self._counts_GB)))

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Returns what each share of the scores is not above, of the first group."""
        return [self._threshold(0, share) for share in shares]

    def _threshold(self, group: int, share: float) -> float:
        counts_B = self._counts_GB[group]
        total = int(counts_B.sum())
        if not total:
            raise ValueError(
                f"--calibration: no token of it reached expert {group} of layer {self._layer}; "
                "give a longer text, or --threshold-of layer"
            )
        below_B = counts_B.cumsum(0)
        # The bucket in which the first score is that is to stay: everything before it goes.
        first_kept = int(torch.searchsorted(below_B, round(share * total), right=True))
        edge = edge_of(min(first_kept, _BUCKETS - 1))
        # Zeros add nothing: none of them has to stay.
        return below(edge) if edge else 0.0


def below(value: float) -> float:
    """Returns the fp32 number next below, which a score has to be above to stay."""
    return float(torch.nextafter(torch.tensor(value), torch.tensor(-torch.inf)))
