"""What to do about a step whose loss or gradients are wrong: the policy, without any training.

Every rank holds one of these and is told the same numbers (they are sums over all ranks), so all
ranks decide the same without asking each other.
"""

from __future__ import annotations

import math
import statistics
from typing import Literal

from mone_megatron.config.schema import TrainConfig

Action = Literal["skip", "rollback"]

# A spike is measured against the median of so many good losses, once there are enough.
SPIKE_WINDOW = 50
SPIKE_LEAST = 10
# Good losses remembered: a rollback makes the median that of the steps before it again.
_REMEMBERED = 10_000


class LossFaults:
    """Judges the loss of each step and chooses between ending, skipping and rolling back."""

    def __init__(self, train: TrainConfig) -> None:
        """Starts with nothing seen."""
        self.train = train
        # (step, loss) of the good steps; only kept where spikes are looked for.
        self._good: list[tuple[int, float]] = []
        self._left_out: set[int] = set()
        self._skips_in_a_row = 0
        self._rollbacks = 0

    def judge(self, step: int, loss: float) -> str | None:
        """Returns why a step must not be applied, from its loss alone; None when it may be."""
        if step in self._left_out:
            return "its batch is left out since the rollback"
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        factor = self.train.spike_factor
        if factor > 0 and len(self._good) >= SPIKE_LEAST:
            median = statistics.median(value for _, value in self._good[-SPIKE_WINDOW:])
            if loss > factor * median:
                return (
                    f"the loss is {loss:.6g}, above train.spike_factor={factor:g} times the recent "
                    f"median {median:.6g}"
                )
        return None

    def accept(self, step: int, loss: float) -> None:
        """Takes note that a step was applied."""
        self._skips_in_a_row = 0
        if self.train.spike_factor > 0:
            self._good.append((step, loss))
            if len(self._good) == 2 * _REMEMBERED:
                del self._good[:_REMEMBERED]

    def decide(self, step: int, fault: str) -> Action:
        """Returns what to do about a step that was not applied.

        Raises:
            FloatingPointError: when the run must end; the message names the step, the fault and
                the policy.
        """
        policy = self.train.on_bad_loss
        if policy == "abort":
            raise FloatingPointError(f"step {step}: {fault} (train.on_bad_loss=abort)")
        if policy == "rollback" and step not in self._left_out:
            if self._rollbacks == self.train.max_rollbacks:
                raise FloatingPointError(
                    f"step {step}: {fault} (train.on_bad_loss=rollback, and "
                    f"train.max_rollbacks={self.train.max_rollbacks} are used up)"
                )
            self._rollbacks += 1
            self._left_out.add(step)
            return "rollback"
        if policy == "skip" and self._skips_in_a_row == self.train.max_skips:
            raise FloatingPointError(
                f"step {step}: {fault} (train.on_bad_loss=skip, and "
                f"train.max_skips={self.train.max_skips} steps in a row were skipped)"
            )
        self._skips_in_a_row += 1
        return "skip"

    def rolled_back(self, step: int) -> None:
        """Forgets the losses after ``step``, whose state is taken up again."""
        self._good = [(at, loss) for at, loss in self._good if at <= step]
        self._skips_in_a_row = 0
