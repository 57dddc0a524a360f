"""Measures the tie rule in training: one model, trained with each tie order, seed by seed.

The order is put in the place of the method's own by forward hooks on the modules that choose
neurons, so nothing of the trainer knows of it.

Shape suffixes: T tokens (rows), E experts, N tokens of the router.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mone_megatron.config.schema import Config
from mone_megatron.kernels.reference import neuron_scores
from mone_megatron.lab.benchmarks.experiments import OpenExperiment, open_experiments
from mone_megatron.lab.benchmarks.ties import (
    TieCounter,
    TieOrder,
    TieStatistics,
    TieWay,
    tie_statistics,
)
from mone_megatron.mone.neurons import NeuronGate
from mone_megatron.parallel.groups import close_groups


@dataclass(frozen=True)
class RouterTies:
    """Holds how often the choice of experts was between equal logits.

    Attributes:
        dtype: of the logits as the router computes them.
        tokens: routed, over all layers.
        tied: share of the tokens whose last chosen and first left expert have equal logits.
        tied_in_bf16: the same share had the logits been rounded to bf16.
    """

    dtype: str
    tokens: int
    tied: float
    tied_in_bf16: float


@dataclass(frozen=True)
class TrainedTies:
    """Holds what was measured of one model after training.

    Attributes:
        way: the dtype of parameters and activations, and the tie order, in words.
        seed: ``train.seed``.
        loss: mean train loss over the counted steps.
        ties: what ties decided in the counted steps.
        router: ties between its logits in the counted steps; None for a dense model.
    """

    way: str
    seed: int
    loss: float
    ties: TieStatistics
    router: RouterTies | None


@dataclass(frozen=True)
class TrainingTies:
    """Holds all models that were trained.

    Attributes:
        hardware: where, in words.
        steps: of each model.
        counted_steps: the last of them, which everything is counted over.
        tokens_per_step: tokens that one model trains on in a step.
        trained: one a seed and way, seeds together.
    """

    hardware: str
    steps: int
    counted_steps: int
    tokens_per_step: int
    trained: list[TrainedTies]


def measure_training(
    config: Config, *, ways: Sequence[TieWay], steps: int, counted_steps: int
) -> TrainingTies:
    """Trains one model for each way, and counts ties in its last steps.

    Collective over the default process group, of one rank, which it closes: loads of neurons are
    counted here.

    Args:
        config: from :func:`mone_megatron.lab.benchmarks.ranks.prepare`, with neuron selection.
        ways: dtypes and tie orders.
        steps: of each training.
        counted_steps: how many of the last to count over.

    """
    assert config.mone.enabled
    assert 1 <= counted_steps <= steps
    sessions = open_experiments(
        [replace(config, device=replace(config.device, dtype=way.dtype)) for way in ways],
        steps_in_memory=steps,
    )
    trained = [
        _train(session, way, config.train.seed, steps, counted_steps)
        for session, way in zip(sessions, ways, strict=True)
    ]
    close_groups()
    tokens = config.train.global_batch_size * config.train.seq_length
    return TrainingTies(sessions[0].device.hardware, steps, counted_steps, tokens, trained)


def _train(
    session: OpenExperiment, way: TieWay, seed: int, steps: int, counted_steps: int
) -> TrainedTies:
    modules = [module for chunk in session.state.chunks for module in chunk.modules()]
    gates = [module for module in modules if isinstance(module, NeuronGate)]
    counters = [
        watch_gate(gate, way.order, seed * 1000 + number)
        for number, gate in enumerate(gates)
        if gate.selector is not None
    ]
    routers = [RouterCounter(module) for module in modules if isinstance(module, TopKRouter)]
    stepper = session.stepper()
    losses = []
    for step in range(steps):
        counting = step >= steps - counted_steps
        for counter in counters:
            counter.counting = counting
        for router in routers:
            router.counting = counting
        loss = stepper.train(session.next_step()).loss
        if counting:
            losses.append(loss)
    return TrainedTies(
        way=str(way),
        seed=seed,
        loss=statistics.fmean(losses),
        ties=tie_statistics(counters),
        router=_router_ties(routers),
    )


def watch_gate(gate: NeuronGate, order: TieOrder, seed: int) -> TieCounter:
    """Makes a tie order choose a gate's neurons from now on, and counts what it decides.

    Args:
        gate: one that keeps the K largest, all of whose neurons are on this rank.
        order: which of equal neurons is kept.
        seed: of the random order.
    """
    selector = gate.selector
    assert selector is not None
    assert selector.rule.top_k
    assert selector.group is None
    counter = TieCounter(order, selector.neurons, selector.kept, gate.num_local_experts, seed)

    def choose(module: Any, inputs: tuple[Any, ...], mask_TF: Tensor) -> Tensor:
        gate_TF, up_TF, expert_T, down_norm_TF = inputs
        scores_TF = neuron_scores(
            gate_TF, up_TF, selector.score.name, selector.activate, down_norm_TF=down_norm_TF
        )
        return counter.choose(scores_TF, expert_T)

    selector.register_forward_hook(choose)
    return counter


class RouterCounter:
    """Counts equal logits at the edge of a router's choice."""

    def __init__(self, router: TopKRouter) -> None:
        """Watches the logits of ``router``."""
        self.counting = False
        self.dtype = ""
        self.tokens = self.tied = self.tied_in_bf16 = 0
        self._chosen = int(router.topk)
        gating = router.gating

        def watched(hidden: Tensor) -> Tensor:
            logits: Tensor = gating(hidden)
            if self.counting:
                self._count(logits.detach().flatten(0, -2))
            return logits

        router.gating = watched

    def _count(self, logits_NE: Tensor) -> None:
        self.dtype = str(logits_NE.dtype).removeprefix("torch.")
        self.tokens += len(logits_NE)
        self.tied += self._tied(logits_NE)
        self.tied_in_bf16 += self._tied(logits_NE.bfloat16())

    def _tied(self, logits_NE: Tensor) -> int:
        if self._chosen >= logits_NE.shape[-1]:
            return 0
        sorted_NE = logits_NE.sort(dim=-1, descending=True).values
        return int((sorted_NE[:, self._chosen - 1] == sorted_NE[:, self._chosen]).sum())


def _router_ties(routers: Sequence[RouterCounter]) -> RouterTies | None:
    tokens = sum(router.tokens for router in routers)
    if not tokens:
        return None
    return RouterTies(
        routers[0].dtype,
        tokens,
        sum(router.tied for router in routers) / tokens,
        sum(router.tied_in_bf16 for router in routers) / tokens,
    )
