"""What a hook is: something that watches a run, step by step."""

from __future__ import annotations

from mone_megatron.train.panel import Panel

Record = dict[str, float]


class Hook:
    """Something that watches a run. Hooks run on every rank; those that write do so on rank 0."""

    def on_start(self) -> None:
        """Before the first step."""

    def on_panel(self, panel: Panel) -> None:
        """Before ``on_step``, on the steps that look at every expert (logging.layer_interval)."""

    def on_step(self, record: Record) -> None:
        """After each step, with its record (see docs/metrics.md)."""

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """After a step that was not applied: why, and whether to ``skip`` or ``rollback``."""

    def on_rollback(self, step: int) -> None:
        """The state is that after ``step`` again; records of later steps will come anew."""

    def on_end(self, status: str) -> None:
        """After the last step, however the run ended: completed, interrupted or failed."""
