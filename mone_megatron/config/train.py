"""Defines the group ``train``: length, batch, evaluation, and what follows a bad loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast, AtMost, NameIn
from mone_megatron.methods.hooks import HOOKS

# NumPy, which shuffles the data, takes seeds below 2**32; megatron-core adds to them by rank.
_LARGEST_SEED = 2**31 - 1
# The first step that train.profile traces: memory is allocated, caches are warm.
PROFILED_FROM = 5


@dataclass(frozen=True)
class TrainConfig(Group):
    """Says how long a run trains, on which batches, and how it is evaluated."""

    steps: Annotated[int, AtLeast(1)] = 100
    """Optimizer steps."""
    seed: Annotated[int, AtLeast(0), AtMost(_LARGEST_SEED)] = 1234
    """The seed of weights, data order and dropout."""
    seq_length: Annotated[int, AtLeast(1)] = 256
    """Tokens in a sequence."""
    global_batch_size: Annotated[int, AtLeast(1)] = 8
    """Sequences per step over all processes."""
    micro_batch_size: Annotated[int, AtLeast(1)] = 2
    """Sequences per forward pass of one model replica."""
    eval_interval: Annotated[int, AtLeast(0)] = 0
    """Evaluate on the validation split every so many steps; 0 for never. The last step always
    evaluates when this is not 0."""
    eval_at_start: bool = False
    """Evaluate before the first step, too: recorded as step 0, and not again by a run that goes
    on from a checkpoint."""
    eval_steps: Annotated[int, AtLeast(1)] = 4
    """Global batches per evaluation."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run on the model meanwhile: names, YAML files or lists of
    names (docs/evaluation.md)."""
    eval_tasks_interval: Annotated[int, AtLeast(0)] = 0
    """Run the tasks every so many steps, and after the last; 0 for never."""
    eval_tasks_limit: Annotated[int, AtLeast(0)] = 0
    """Questions of each task; 0 for all."""
    hooks: tuple[Annotated[str, NameIn(HOOKS)], ...] = ()
    """More to measure or watch, in this order (docs/extending.md): `loss_average`, a running
    average of the loss."""
    recompute: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes the activations of attention and the MoE layer; `full` whole
    layers."""
    profile: Annotated[int, AtLeast(0)] = 0
    """Trace so many steps on rank 0, from the fifth of this process on: where their time goes
    (docs/performance.md); 0 for none."""
    exit_after_minutes: Annotated[float, AtLeast(0)] = 0.0
    """Save and stop at the end of the step after so many minutes of the run, with the exit code
    that asks to be started again; 0 for never."""
    on_bad_loss: Literal["abort", "skip", "rollback"] = "abort"
    """A step whose loss or gradient is not finite, or whose loss is a spike, is never applied; then
    `abort` ends the run, `skip` goes on with the next batch, `rollback` goes back to the newest
    checkpoint and leaves the batch out (docs/reliability.md)."""
    spike_factor: float = 0.0
    """A spike is a loss above so many times (more than 1) the median of the last 50 good ones; 0
    for no check."""
    max_skips: Annotated[int, AtLeast(0)] = 10
    """`skip` ends the run after so many skipped steps in a row."""
    max_rollbacks: Annotated[int, AtLeast(0)] = 3
    """`rollback` ends the run after so many rollbacks."""

    def unread(self) -> Mapping[str, str]:
        """Returns how long an evaluation is and how often a step is tried, where none is."""
        unread = {}
        if self.eval_interval <= 0:
            unread["eval_steps"] = "train.eval_interval=0"
        if not self.eval_tasks:
            unread["eval_tasks_limit"] = "no train.eval_tasks"
        for name, of in (("max_skips", "skip"), ("max_rollbacks", "rollback")):
            if self.on_bad_loss != of:
                unread[name] = f"train.on_bad_loss={self.on_bad_loss}"
        return unread

    def boundless(self) -> Collection[str]:
        """Returns the length of an evaluation where there is none."""
        return () if self.eval_interval > 0 else ("eval_steps",)

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if self.profile and PROFILED_FROM - 1 + self.profile > self.steps:
            yield (
                f"train.profile: {self.profile} steps from the fifth on are more than train.steps="
                f"{self.steps}; use 0, or at most {max(0, self.steps - PROFILED_FROM + 1)}"
            )
        if self.spike_factor != 0 and self.spike_factor <= 1:
            yield (
                f"train.spike_factor: {self.spike_factor:g} would call an ordinary loss a spike; "
                "use a factor above 1 such as 3, or 0 for no check"
            )
        for name, count in sorted(Counter(self.hooks).items()):
            if count > 1:
                yield f"train.hooks: {name} is named {count} times; name it once"
        if self.eval_at_start and self.eval_interval == 0:
            yield (
                "train.eval_at_start: true with train.eval_interval=0, which never evaluates; use "
                f"train.eval_interval={self.steps} for the first and the last step alone, or "
                "train.eval_at_start=false"
            )
        if not self.eval_tasks and self.eval_tasks_interval:
            yield (
                f"train.eval_tasks_interval: {self.eval_tasks_interval} with no train.eval_tasks; "
                "name some, or use 0"
            )
        if self.eval_tasks and self.eval_tasks_interval == 0:
            yield (
                "train.eval_tasks_interval: 0 never runs train.eval_tasks; use a number of steps, "
                "or train.eval_tasks=[]"
            )
