"""Steers densities: of kept neurons (``mone.density``) and of chosen experts
(``model.router.density``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mone_megatron.config.density import steered_start
from mone_megatron.config.schema import Config
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.mone.density import (
    COEFFICIENT_START,
    DensityController,
    DensityMeter,
    from_digits,
    to_digits,
)
from mone_megatron.mone.neurons import NeuronGate
from mone_megatron.mone.routers import SteeredRouter
from mone_megatron.mone.selection import NeuronSelector


class DensityHook(Hook):
    """Measures a density over all ranks in each step, and moves the quantity that decides it.

    Checkpoints hold the quantity. A step that is not applied moves nothing.
    """

    def __init__(
        self,
        prefix: str,
        controller: DensityController,
        meters: Sequence[DensityMeter],
        *,
        target_at: Callable[[int], float],
        apply: Callable[[float], None],
        device: torch.device,
    ) -> None:
        """Begins to count, and gives the model the first value.

        Args:
            prefix: of the names of what is recorded: ``mone`` or ``router``.
            controller: with the first value.
            meters: of this rank's modules, which count different things.
            target_at: gives the density that is wanted in a step (from 1).
            apply: gives this rank's modules a value.
            device: where the step's collective is.
        """
        self.prefix = prefix
        self.controller = controller
        self.meters = meters
        self.target_at = target_at
        self.apply = apply
        self.device = device
        for meter in meters:
            meter.counting = True
        apply(controller.value)

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns this rank's counts of what was kept, and of how much."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        for meter in self.meters:
            counts += meter.take(self.device)
        return {"counts": to_digits(counts)}

    def record(self, report: StepReport) -> Record:
        """Returns the density and the quantity of the step, and moves the quantity for the next.

        A step in which nothing could be left out (the start of a schedule) records nothing.
        """
        kept, seen = from_digits(report.sums["counts"])
        if seen == 0:
            return {}
        density, value = kept / seen, self.controller.value
        if report.fault is None:
            self.controller.observe(density, self.target_at(report.step))
            self.apply(self.controller.value)
        return {f"{self.prefix}/step_density": density, f"{self.prefix}/steered": value}

    def state(self) -> dict[str, Any]:
        """Returns the quantity."""
        return {"value": self.controller.value}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with the quantity."""
        self.controller.value = state["value"]
        self.apply(self.controller.value)


def density_hooks(
    config: Config, chunks: Iterable[nn.Module], device: torch.device
) -> dict[str, DensityHook]:
    """Returns the controllers that are on, by the section that asks for each."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    hooks = {}
    mone = config.mone
    if mone.enabled and DENSITY_STEPS[mone.density.step].factor is not None:
        hooks["mone.density"] = _neurons(config, modules, device)
    if config.model.num_experts and ROUTERS[config.model.router.kind].loss is not None:
        # With a controller that is off, too: it gives the loss its coefficient.
        hooks["model.router.density"] = _experts(config, modules, device)
    return hooks


def _neurons(config: Config, modules: Iterable[nn.Module], device: torch.device) -> DensityHook:
    """Returns the controller of the share of neurons that are kept."""
    mone, density = config.mone, config.mone.density
    steerable = RULES[mone.rule].steerable.get(density.steers)
    if steerable is None:
        assert density.steers == "sparsity_coeff", "checked by config.validate"
        gates = [
            module
            for module in modules
            if isinstance(module, NeuronGate) and module.sparsity is not None
        ]
        selectors = [gate.selector for gate in gates if gate.selector is not None]
        start, largest, raises = COEFFICIENT_START, density.cap, False

        def apply(value: float) -> None:
            for gate in gates:
                assert gate.sparsity is not None
                gate.sparsity = replace(gate.sparsity, coeff=value)
    else:
        selectors = [module for module in modules if isinstance(module, NeuronSelector)]
        start, largest, raises = steerable.start, steerable.largest, steerable.raises

        def apply(value: float) -> None:
            for selector in selectors:
                selector.steer(density.steers, value)

    return DensityHook(
        "mone",
        DensityController(
            density.step, density.rate, steered_start(density, start), largest, raises
        ),
        [selector.meter for selector in selectors],
        target_at=lambda step: density.target or mone.keep_ratio_at(step),
        apply=apply,
        device=device,
    )


def _experts(config: Config, modules: Iterable[nn.Module], device: torch.device) -> DensityHook:
    """Returns the controller of the share of experts that a token goes to."""
    model, density = config.model, config.model.router.density
    routers = [module for module in modules if isinstance(module, SteeredRouter)]
    target = density.target or model.experts_per_token / model.num_experts

    def apply(value: float) -> None:
        for router in routers:
            router.coefficient = value

    start = steered_start(density, COEFFICIENT_START)
    return DensityHook(
        "router",
        DensityController(density.step, density.rate, start, density.cap),
        [router.meter for router in routers],
        target_at=lambda step: target,
        apply=apply,
        device=device,
    )
