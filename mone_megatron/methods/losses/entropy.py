"""Is how far the entropy of the mean weights is from that of even ones, in parts of the latter.

0 when all neurons weigh the same, 1 when one of them has all the weight. It looks at the weights
alone: unlike ``switch`` it presses on neurons with much weight also where all are kept equally
often. An expert without tokens counts 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mone_megatron.methods.loss import NeuronLoss, SelectionSums

if TYPE_CHECKING:
    from torch import Tensor


def entropy(sums: SelectionSums) -> Tensor:
    """Returns this rank's part of the mean over experts of 1 - H / log f, an fp32 scalar."""
    mean_SF = sums.mean_SF
    # 0 log 0 is 0, and its slope is left out.
    held_SF = mean_SF > 0
    safe_SF = mean_SF.where(held_SF, 1.0)
    parts_SF = safe_SF.log() * safe_SF / math.log(max(2, sums.neurons)) + 1 / sums.neurons
    return (parts_SF * sums.used_S1).sum() / sums.num_experts


METHOD = NeuronLoss(
    name="entropy",
    formula="1 - H(P) / log f of the mean weights P",
    source="Shannon's entropy, of the mean weights",
    function=entropy,
    linear=False,
    normalized=True,
)
