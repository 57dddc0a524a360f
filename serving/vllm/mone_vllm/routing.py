"""Chooses the experts that a token goes to, where vLLM's own routers compute it otherwise.

Shape suffixes: N tokens, A all experts, K experts of a token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Route = Callable[..., tuple[Tensor, Tensor]]


def route_of(config: Any, gate: Any) -> Route | None:
    """Returns the function that chooses experts; None where vLLM's softmax router is the same.

    Args:
        config: the model's.
        gate: the router's weights, and its bias where there is one.

    Raises:
        ValueError: the configuration names a score function that is unknown.
    """
    if config.router_score_function not in ("softmax", "sigmoid"):
        raise ValueError(
            f"config.router_score_function: {config.router_score_function!r} is not softmax or "
            "sigmoid"
        )
    plain = config.router_score_function == "softmax" and config.router_scaling_factor == 1.0
    if plain and not config.router_bias and not config.topk_group:
        return None

    def route(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the weights and the numbers of the chosen experts, ``[N, K]``."""
        logits_NA = gating_output.float()
        if config.router_score_function == "sigmoid":
            scores_NA = logits_NA.sigmoid()
            biased_NA = (
                scores_NA + gate.e_score_correction_bias if config.router_bias else scores_NA
            )
            index_NK = _choose(biased_NA, topk, config.n_group, config.topk_group)
            weights_NK = scores_NA.gather(-1, index_NK)
            if topk > 1:
                weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        elif config.norm_topk_prob:
            index_NK = _choose(logits_NA, topk, config.n_group, config.topk_group)
            weights_NK = logits_NA.gather(-1, index_NK).softmax(dim=-1)
        else:
            scores_NA = logits_NA.softmax(dim=-1)
            index_NK = _choose(scores_NA, topk, config.n_group, config.topk_group)
            weights_NK = scores_NA.gather(-1, index_NK)
        return weights_NK * config.router_scaling_factor, index_NK

    return route


def _choose(scores_NA: Tensor, topk: int, groups: int, chosen_groups: int) -> Tensor:
    """Returns the experts with the largest scores, within the best groups if there are groups."""
    if chosen_groups:
        scores_NGE = scores_NA.unflatten(-1, (groups, -1))
        # A group is as good as its best (K / chosen groups) experts together.
        best_NG = scores_NGE.topk(topk // chosen_groups, dim=-1).values.sum(dim=-1)
        chosen = best_NG.topk(chosen_groups, dim=-1, sorted=False).indices
        left_out_NG = torch.ones_like(best_NG, dtype=torch.bool).scatter(-1, chosen, False)
        scores_NA = scores_NGE.masked_fill(left_out_NG.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores_NA.topk(topk, dim=-1).indices
