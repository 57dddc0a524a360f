"""Holds what a scaling study is asked for and what it finds: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mone_megatron.lab.scaling_law.bootstrap import (
    DEFAULT_RESAMPLES,
    Bounds,
    IsoFlopSamples,
    Kind,
    LawSamples,
)
from mone_megatron.lab.scaling_law.fit import ALL_STARTS, DEFAULT_DELTA, Fit
from mone_megatron.lab.scaling_law.holdout import Errors
from mone_megatron.lab.scaling_law.isoflop import DEFAULT_TOLERANCE, IsoFlopFit, Parabola
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.report.identified import Doubt

Method = Literal["parametric", "isoflop"]
METHODS: tuple[Method, ...] = ("parametric", "isoflop")


@dataclass(frozen=True)
class Request:
    """Holds a point whose loss is asked for."""

    params: float
    tokens: float
    ratio: float = 1.0


@dataclass(frozen=True)
class Options:
    """Holds what to do with a table; the defaults are those of the command.

    Attributes:
        methods: fits to make.
        delta: where the Huber loss of the log loss turns from quadratic to linear.
        neuron_term: fit the activated-neuron term.
        starts: starting points of the parametric fit, at most 4,500.
        seed: of starts, folds and resamples.
        resamples: resamples of the bootstrap; 0 gives no intervals.
        bootstrap_kind: what is resampled.
        confidence: share of resamples that an interval holds, such as 0.95.
        holdout_budgets: largest FLOP budgets to hold out; 0 for none.
        folds: folds of the cross-validation; 0 for none.
        budget_tolerance: relative width of one FLOP budget.
        parabola_width: take only sizes within this factor of a budget's best; None takes all.
        allow_outside: take parabolas' minima outside the sizes of their budget.
        allow_mismatch: fit although the table says that its rows are not comparable.
        budgets: FLOP budgets to allocate.
        keep_ratio: of the models to allocate them to.
        flops_per_param_token: FLOPs over N*D of those models; None takes the table's median.
        requests: points to predict.
        progress: show progress lines.
    """

    methods: tuple[Method, ...] = ("parametric",)
    delta: float = DEFAULT_DELTA
    neuron_term: bool = False
    starts: int = ALL_STARTS
    seed: int = 0
    resamples: int = DEFAULT_RESAMPLES
    bootstrap_kind: Kind = "rows"
    confidence: float = 0.95
    holdout_budgets: int = 1
    folds: int = 5
    budget_tolerance: float = DEFAULT_TOLERANCE
    parabola_width: float | None = None
    allow_outside: bool = False
    allow_mismatch: bool = False
    budgets: tuple[float, ...] = ()
    keep_ratio: float = 1.0
    flops_per_param_token: float | None = None
    requests: tuple[Request, ...] = ()
    progress: bool = False


@dataclass(frozen=True)
class Estimate:
    """Holds a value, its interval, if any, and why it is not identified (nothing if it is)."""

    value: float
    interval: Bounds | None
    doubts: tuple[Doubt, ...] = ()

    @property
    def identified(self) -> bool:
        """Returns whether the table determines the value."""
        return not self.doubts


@dataclass(frozen=True)
class AllocationEstimate:
    """Holds where a budget is best spent, by one method."""

    method: Method
    flops: float
    params: Estimate
    tokens: Estimate
    # None for IsoFLOP, which says where the least loss is and not how large.
    loss: Estimate | None
    # FLOPs over the largest of the table: above 1 the answer is extrapolated.
    reach: float

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Returns the numbers of the allocation by name."""
        named = {"N_opt": self.params, "D_opt": self.tokens}
        return named if self.loss is None else {**named, "loss": self.loss}


@dataclass(frozen=True)
class Prediction:
    """Holds a requested point's loss; `reach` is the larger of its N and D over the table's."""

    request: Request
    loss: Estimate
    reach: float


@dataclass(frozen=True)
class Parametric:
    """Holds results of the parametric fit; a text in place of errors says why there are none."""

    fit: Fit
    samples: LawSamples | None
    coefficients: dict[str, Estimate]
    # Exponents of N_opt and D_opt over C; None when the law has no optimum.
    exponents: dict[str, Estimate] | None
    in_sample: Errors
    holdout: Errors | str | None
    folds: Errors | str | None
    flops_per_param_token: float
    allocations: tuple[AllocationEstimate, ...]
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class IsoFlop:
    """Holds the results of the parabolas."""

    fit: IsoFlopFit
    samples: IsoFlopSamples | None
    # N at the minimum of each used parabola.
    minima: tuple[tuple[Parabola, Estimate], ...]
    exponents: dict[str, Estimate]
    allocations: tuple[AllocationEstimate, ...]


@dataclass(frozen=True)
class Study:
    """Holds everything found; `warnings` are what a reader must know before believing it."""

    table: Table
    options: Options
    parametric: Parametric | None
    isoflop: IsoFlop | None
    warnings: tuple[str, ...]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Returns every number that was estimated, by the name that reports call it by."""
        named: dict[str, Estimate] = {}
        if self.parametric is not None:
            named |= self.parametric.coefficients | (self.parametric.exponents or {})
            for prediction in self.parametric.predictions:
                asked = prediction.request
                named[f"loss at N {asked.params:.3g}, D {asked.tokens:.3g}"] = prediction.loss
        if self.isoflop is not None:
            for parabola, minimum in self.isoflop.minima:
                named[f"IsoFLOP minimum of {parabola.flops:.3g} FLOPs"] = minimum
            named |= {f"IsoFLOP {name}": one for name, one in self.isoflop.exponents.items()}
        for fit in (self.parametric, self.isoflop):
            for one in fit.allocations if fit is not None else ():
                for what, estimate in one.estimates.items():
                    named[f"{one.method} {what} of {one.flops:.3g} FLOPs"] = estimate
        return named
