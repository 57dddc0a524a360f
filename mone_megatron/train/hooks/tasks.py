"""Tasks on the model that is being trained: ``train.eval_tasks_interval``."""

from __future__ import annotations

from mone_megatron.config.schema import TrainConfig
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.train.evaluate.tasks import TaskEvaluation
from mone_megatron.train.hooks.due import is_due


class TaskHook(Hook):
    """Runs the tasks every so many steps. Collective over all ranks."""

    def __init__(self, train: TrainConfig, tasks: TaskEvaluation) -> None:
        """Takes the tasks, loaded."""
        self.train = train
        self.tasks = tasks

    def record(self, report: StepReport) -> Record:
        """Returns the scores on rank 0, and nothing on the others."""
        if not is_due(report.step, self.train.eval_tasks_interval, self.train.steps):
            return {}
        return self.tasks.run()
