"""The run in TensorBoard (``logging.tensorboard``): event files beside the others."""

from __future__ import annotations

from pathlib import Path

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record

# In run.dir.
FOLDER = "tensorboard"


class TensorBoardHook(Hook):
    """Writes every number of a record as a scalar of its step."""

    def __init__(self, config: Config, folder: Path, *, step: int) -> None:
        """Takes where to write.

        Args:
            config: of the run.
            folder: run.dir.
            step: after which the run begins or goes on.
        """
        self.config = config
        self.path = folder / FOLDER
        self.step = step

    def on_start(self) -> None:
        """Opens a file; what an interrupted run wrote of later steps is no longer shown."""
        # Only now, and only for runs that ask for it: it takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1)

    def on_start_record(self, record: Record) -> None:
        """Writes the record of step 0."""
        self._write(record)

    def on_step(self, record: Record) -> None:
        """Writes the record at the intervals at which W&B gets it, too."""
        step = int(record["step"])
        due = step % self.config.logging.interval == 0 or step == self.config.train.steps
        if due or "panel_seconds" in record:
            self._write(record)

    def _write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(record["step"]))

    def on_rollback(self, step: int) -> None:
        """Begins a file in which the steps after ``step`` come anew."""
        self.writer.close()
        self.step = step
        self.on_start()

    def on_end(self, status: str) -> None:
        """Writes what is left."""
        self.writer.close()
