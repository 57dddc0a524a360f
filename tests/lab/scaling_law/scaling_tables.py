"""Tables made by a known law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import Table

# The Huber fit of FLAME-MoE's analysis/find_scaling_law.ipynb (repository cmu-flame/FLAME-MoE,
# commit e9b2fe2), over activated parameters.
FLAME = Law(E=2.241716, A=148.413257, alpha=0.279702, B=3269017.372472, beta=0.715500)

# Activated parameters and budgets that the notebook's printed rows name.
FLAME_SIZES = (33.4e6, 82.2e6, 114.5e6, 219e6, 354.9e6, 1e9)
FLAME_BUDGETS = (3e18, 6e18, 3e19, 1e20)


def build_table(
    law: Law = FLAME,
    *,
    sizes: Sequence[float] = FLAME_SIZES,
    budgets: Sequence[float] = FLAME_BUDGETS,
    ratios: Sequence[float] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Table:
    """Every size at every budget (C = 6 N D), and at every keep ratio; errors of the log loss."""
    grid = np.array(
        [
            (size, budget, ratio)
            for size in sizes
            for budget in budgets
            for ratio in ratios or (1.0,)
        ]
    )
    params_R, flops_R, ratio_R = grid.T
    tokens_R = flops_R / (6 * params_R)
    errors_R = noise * np.random.default_rng(seed).standard_normal(len(grid))
    return Table(
        source="table",
        names=tuple(f"row {row + 1}" for row in range(len(grid))),
        params_R=params_R,
        tokens_R=tokens_R,
        loss_R=law.loss(params_R, tokens_R, ratio_R) * np.exp(errors_R),
        flops_R=flops_R,
        ratio_R=ratio_R if ratios else None,
        flops_rule="6 N D",
    )
