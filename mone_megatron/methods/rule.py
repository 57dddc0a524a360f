"""Defines what a selection rule is: the function that says which neurons each token keeps.

It imports no torch, so that names and options can be checked without.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mone_megatron.methods.options import NoOptions, Option, options_of, read_options

if TYPE_CHECKING:
    from torch import Tensor

    from mone_megatron.methods.score import Score

# What expert tensor parallelism has to exchange, since the neurons of a row lie on several ranks:
# nothing, what :meth:`Rows.largest` exchanges, sums over the ranks (:class:`Shards`), or something
# that nobody has written.
Exchange = Literal["nothing", "largest", "sums", "refused"]


# A rule's state is kept in buffers whose names begin so, in training and in exports.
STATE_PREFIX = "rule_"


def count_kept(keep_ratio: float, neurons: int) -> int:
    """Returns K = round(keep_ratio * f): how many of f neurons a keep ratio stands for."""
    return round(keep_ratio * neurons)


@dataclass(frozen=True)
class Budget:
    """Says how many neurons a rule is to keep, and holds its options.

    Attributes:
        keep_ratio: the target density, ``mone.keep_ratio``: a rule with a fixed count keeps exactly
            ``kept`` neurons of each row, and others come near to it on average.
        neurons: f, how many the whole expert has.
        options: an instance of the rule's own options.
    """

    keep_ratio: float
    neurons: int
    options: Any = field(default_factory=NoOptions)

    @property
    def kept(self) -> int:
        """Returns K, the number of neurons of a row that the keep ratio stands for."""
        return count_kept(self.keep_ratio, self.neurons)


class Shards(Protocol):
    """Stands for the ranks that share the neurons of each row, in the order of the neurons."""

    @property
    def rank(self) -> int:
        """Returns this rank's place among them."""

    @property
    def size(self) -> int:
        """Returns how many they are."""

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks, of tensors of one shape. Collective."""


@dataclass(frozen=True)
class Rows:
    """Holds some rows whose neurons a rule chooses among.

    Attributes:
        scores_TF: the score of each neuron on this rank.
        budget: how many neurons of the whole expert to keep.
        largest_of: gives the exact mask of the k largest values of every row of a matrix, ties to
            the lowest index: as fast as the device allows, and over all ranks that share the row.
            The matrix has a column for each neuron, or for each of equally many adjacent ones.
        expert_T: int64, the expert on this rank that each row belongs to.
        num_experts: E, the experts on this rank.
        shards: the other ranks that hold neurons of these rows; None when there are none.
        state: the rule's state, one tensor a name, of shape ``[E]``.
        training: whether the rows are of a training step. A rule that looks at other rows than a
            token's own must not do so otherwise.
        blocks: int64 ``[T]``, which rows are of one expert and one microbatch, by equal numbers;
            None where each expert's rows are.
        token_T: int64, which rows are of one token, by equal numbers from 0; None where each row is
            a token. Known to rules that pool.
        weight_T: the router's weight of each row; None for 1. Known to rules that pool.
    """

    scores_TF: Tensor
    budget: Budget
    largest_of: Callable[[Tensor, int], Tensor]
    expert_T: Tensor
    num_experts: int = 1
    shards: Shards | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    training: bool = False
    blocks: Tensor | None = None
    token_T: Tensor | None = None
    weight_T: Tensor | None = None

    @property
    def on_host(self) -> bool:
        """Returns whether the host reads the rows without waiting for a GPU."""
        return self.scores_TF.device.type == "cpu"

    @property
    def block_T(self) -> Tensor:
        """Returns the block of each row, int64 ``[T]``: its expert's rows of its microbatch."""
        return self.expert_T if self.blocks is None else self.blocks

    def largest(self, k: int) -> Tensor:
        """Returns the exact mask ``[T, F]`` of the k largest scores of every row."""
        return self.largest_of(self.scores_TF, k)

    def above(self, tau_E: Tensor, known_E: Tensor) -> Tensor:
        """Returns True where a score is above its expert's threshold, ``[T, F]``.

        Rows of experts that have no threshold yet keep their K largest scores; a row that holds a
        NaN keeps nothing.

        Args:
            tau_E: the thresholds.
            known_E: 0 for experts that have none yet.
        """
        tau_T1 = tau_E[self.expert_T].unsqueeze(-1)
        new_T1 = known_E[self.expert_T].unsqueeze(-1) == 0
        broken_T1 = self.scores_TF.isnan().any(dim=-1, keepdim=True)
        mask_TF = (self.scores_TF > tau_T1) & ~broken_T1
        return self.largest_of_new(new_T1, mask_TF)

    def largest_of_new(self, new_T1: Tensor, mask_TF: Tensor) -> Tensor:
        """Returns a mask with the K largest scores in the rows that are new, ``[T, F]``.

        Args:
            new_T1: True for rows of experts whose state says nothing yet.
            mask_TF: the mask of the others.
        """
        # A GPU computes it for nothing, too: to ask whether there are such rows is to wait for it.
        if self.on_host and not new_T1.any():
            return mask_TF
        return self.largest(self.budget.kept).where(new_T1, mask_TF)

    def sum_by_expert(self, values_T: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns values of the rows added up by expert, fp32 ``[E]``, under the same names."""
        return {
            name: value_T.new_zeros(self.num_experts).index_add(0, self.expert_T, value_T)
            for name, value_T in values_T.items()
        }

    def sum(self, part: Tensor) -> Tensor:
        """Returns a tensor summed over the ranks that share the rows. Collective."""
        return part if self.shards is None else self.shards.sum(part)


def _all_neurons(budget: Budget) -> int:
    return budget.neurons


def _one_neuron(budget: Budget) -> int:
    return 1


def _nothing_wrong(budget: Budget) -> None:
    """Takes every budget."""


@dataclass(frozen=True)
class Steerable:
    """Describes one number of a rule's state that ``mone.density`` can steer instead of the rule.

    Attributes:
        start: its first value.
        largest: what it never exceeds.
        raises: whether more of it keeps more neurons.
        beside: the other numbers of the state while it is steered, by name.
        unless: the option that takes its place when it is not at its default.
        moved_by: the options that say how the rule itself moves it, which nothing reads while it is
            steered or has a fixed value.
    """

    start: float
    largest: float
    raises: bool
    beside: Mapping[str, float] = field(default_factory=dict)
    unless: str | None = None
    moved_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Describes one selection rule; ``mone.rule`` names it.

    Attributes:
        name: the rule's name in the configuration.
        formula: what it keeps, for tables and figures.
        source: the paper or place that it comes from.
        mask: the mask of kept neurons of some rows, bool ``[T, F]``, True at kept ones; called
            without gradients. A row that holds a NaN keeps nothing, so that the NaN spreads.
        options: a dataclass of ``mone.rule_options`` (:mod:`.methods.options`).
        check: raises ``ValueError``, naming ``mone.keep_ratio`` or ``mone.rule_options.NAME``, for
            a budget that the rule cannot keep.
        score: the score that it is written for, whose densities come near to the keep ratio; None
            where any is as good. Others may be chosen: then the density is what is measured.
        fixed_count: whether each row keeps exactly ``budget.kept`` neurons.
        keeps_budget: whether the rule itself comes to the keep ratio; otherwise the density is what
            the model makes it.
        keeps_nonzero: whether it keeps the neurons whose scores are not zero, so that one without
            activation is left out before its up projection is known.
        causal: whether a token's mask depends on no other token outside training.
        reads_batch: whether in training a token's mask depends on the other rows of its block. A
            layout that splits a microbatch's rows of an expert over ranks is refused then.
        pools: whether it ranks the neurons of all experts of a token together. Layouts that spread
            a token's experts over ranks are refused then.
        exchange: what expert tensor parallelism has to exchange.
        unit: how many adjacent neurons are chosen together, and so must lie on one rank.
        most_kept: the largest number of neurons that a row can keep: what packed memory, the
            planner and decoding make room for.
        state: the initial value of each tensor of its state, by name. Each is fp32 ``[E]``, in the
            checkpoints, and the same in every layout.
        observe: sums of a training step's rows that the state is made of, each fp32 ``[E]``; they
            are added over microbatches and ranks. Needed with a state.
        advance: the new state of the old one and those sums, once at the end of each step that is
            applied. Needed with a state.
        shift: what is taken from the gate projections of rows before anything else, fp32
            ``[T, 1]``; it carries the gradient, and ``rows.scores_TF`` are the gate projections
            themselves. The mask then gets scores of what is left.
        shift_option: the option, true or false, that asks for it. No export has it.
        steerable: the numbers of the state that ``mone.density.steers`` may name.
        top_k: whether the mask is ``rows.largest(budget.kept)`` and nothing else. Kernels that
            select while they multiply know this rule; any other gives them its mask.
    """

    name: str
    formula: str
    source: str
    mask: Callable[[Rows], Tensor]
    options: type = NoOptions
    check: Callable[[Budget], None] = _nothing_wrong
    score: str | None = None
    fixed_count: bool = True
    keeps_budget: bool = True
    keeps_nonzero: bool = False
    causal: bool = True
    reads_batch: bool = False
    pools: bool = False
    exchange: Exchange = "refused"
    unit: Callable[[Budget], int] = _one_neuron
    most_kept: Callable[[Budget], int] = _all_neurons
    state: Mapping[str, float] = field(default_factory=dict)
    observe: Callable[[Rows, Tensor], Mapping[str, Tensor]] | None = None
    advance: (
        Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Budget], Mapping[str, Tensor]] | None
    ) = None
    shift: Callable[[Rows], Tensor] | None = None
    shift_option: str = ""
    steerable: Mapping[str, Steerable] = field(default_factory=dict)
    top_k: bool = False
    _options: Mapping[str, Option] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Asserts that a rule with a state says how it moves."""
        object.__setattr__(self, "_options", options_of(self.options))
        stateful = {bool(self.state), self.observe is not None, self.advance is not None}
        assert len(stateful) == 1, f"rule {self.name}: state, observe and advance come together"
        assert self.steerable.keys() <= self.state.keys(), f"rule {self.name}: steers its state"
        moving = {option for each in self.steerable.values() for option in each.moved_by}
        assert moving <= self._options.keys(), f"rule {self.name}: options move its state"
        assert not (self.state and self.top_k), f"rule {self.name}: kernels see no state"

    def budget(
        self, keep_ratio: float, neurons: int, options: Mapping[str, Any] | None = None
    ) -> Budget:
        """Returns the budget of an expert of ``neurons`` neurons.

        Args:
            keep_ratio: the target density, above 0 and at most 1.
            neurons: f, how many the expert has.
            options: the rule's options by name, as the configuration has them; those left out take
                their defaults.

        Raises:
            ValueError: the ratio is out of range or keeps no neuron, an option is unknown or of
                another type, or the rule refuses the budget.
        """
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"mone.keep_ratio: {keep_ratio} is not in (0, 1]")
        if count_kept(keep_ratio, neurons) < 1:
            raise ValueError(
                f"mone.keep_ratio: {keep_ratio} of {neurons} neurons keeps none; "
                f"use at least {1 / neurons:.3g}"
            )
        budget = Budget(keep_ratio, neurons, self.read_options(options or {}))
        self.check(budget)
        return budget

    def read_options(self, options: Mapping[str, Any]) -> Any:
        """Returns an instance of the rule's options.

        Args:
            options: values by name; those left out take their defaults.

        Raises:
            ValueError: a name is unknown, or a value is of another type, one line for each.
        """
        return read_options(
            self.options,
            self._options,
            options,
            key="mone.rule_options",
            owner=f"mone.rule={self.name}",
        )

    def needs_up_of_active(self, score: Score, *, changes_up: bool) -> bool:
        """Returns whether it needs the up projections of active neurons, and keeps fewer of them.

        Active are those whose activation is not zero. Where up projections are taken as they are,
        active neurons are the kept ones; where they are rectified, too, some of them are not.

        Args:
            score: what neurons are chosen by.
            changes_up: whether the activation is a function of the up projection, too.
        """
        return self.keeps_nonzero and score.reads_up and changes_up

    def shifts(self, options: Mapping[str, Any]) -> bool:
        """Returns whether options, as the configuration has them, ask for :attr:`shift`."""
        return self.shift is not None and bool(options.get(self.shift_option))

    def shard_problem(self, budget: Budget, ranks: int) -> str | None:
        """Returns why the rule cannot select over neurons that lie on ``ranks`` ranks, or None."""
        if ranks == 1:
            return None
        if self.exchange == "refused":
            return f"mone.rule={self.name} cannot select over ranks"
        unit = self.unit(budget)
        # Single neurons may lie on ranks in any numbers (transformers splits 15 over 2).
        if unit > 1 and (budget.neurons % ranks or budget.neurons // ranks % unit):
            return (
                f"mone.rule={self.name} chooses {unit} adjacent neurons together, which do not "
                f"divide {budget.neurons} neurons over {ranks} ranks"
            )
        return None
