"""``metrics.jsonl``: the record of every step."""

from __future__ import annotations

from pathlib import Path

from mone_megatron.methods.hook import Hook, Record
from mone_megatron.os_errors import naming
from mone_megatron.train.run_directory import keep_metrics_up_to, to_json_line


class MetricsFileHook(Hook):
    """Writes ``metrics.jsonl``: one JSON object a step, on disk when the step is done."""

    def __init__(self, folder: Path) -> None:
        """Writes into ``folder``."""
        self.path = folder / "metrics.jsonl"

    def on_start(self) -> None:
        """Opens the file; a resumed run goes on with it."""
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def on_start_record(self, record: Record) -> None:
        """Writes the record of step 0."""
        self.on_step(record)

    def on_step(self, record: Record) -> None:
        """Appends the record."""
        with naming(self.path):
            self.file.write(to_json_line(record))

    def on_rollback(self, step: int) -> None:
        """Drops the records that will come anew."""
        self.file.close()
        keep_metrics_up_to(self.path, step)
        self.on_start()

    def on_end(self, status: str) -> None:
        """Closes the file."""
        self.file.close()
