"""``train.eval_tasks``: tasks of lm-evaluation-harness on the model that is being trained.

Rank 0 runs the harness and asks; every rank, rank 0 among them, scores what it asks in lockstep. So
only rank 0 needs the harness and the tasks' data, and no two ranks can disagree on what is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mone_megatron.config.schema import TrainConfig
from mone_megatron.data.framing import Framing
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.train.evaluate.scoring import Scorer
from mone_megatron.train.resume.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from mone_megatron.evaluation.scored_lm import ScoredLM
    from mone_megatron.evaluation.tasks import LoadedTasks

# What rank 0 says instead of requests; a text says why it cannot go on.
_DONE = None


class TaskEvaluation:
    """Runs the tasks when asked. Every method is collective over all ranks.

    Global random streams are as before after each of them: tasks are code, and may draw or seed.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer_dir: Path,
        scorer: Scorer,
        framing: Framing | None = None,
    ) -> None:
        """Loads the tasks, on rank 0.

        Args:
            config: ``eval_tasks`` and what belongs to it.
            tokenizer_dir: of the model's tokenizer.
            scorer: scores on all ranks.
            framing: the special tokens around documents; None follows the tokenizer's own template.

        Raises:
            ValueError: on every rank: a task is unknown, cannot be loaded, or writes text.
        """
        self.limit = config.eval_tasks_limit or None
        self.scorer = scorer
        self._lm: ScoredLM | None = None
        self._tasks: LoadedTasks | None = None
        self._scoring = False
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            with _same_random_state():
                try:
                    self._load(config, tokenizer_dir, framing)
                except (ValueError, OSError) as error:
                    problem = [f"train.eval_tasks: {error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise ValueError(problem[0])

    def run(self) -> dict[str, float]:
        """Asks everything: ``eval/TASK/METRIC`` and ``..._stderr`` on rank 0, nothing elsewhere."""
        with _same_random_state():
            if self._lm is None:
                self._serve()
                return {}
            return self._ask()

    def _load(self, config: TrainConfig, tokenizer_dir: Path, framing: Framing | None) -> None:
        # An optional package, and slow to import.
        from mone_megatron.evaluation.scored_lm import ScoredLM
        from mone_megatron.evaluation.tasks import expand, load_tasks

        tasks = load_tasks(expand(config.eval_tasks))
        for name, task in tasks.tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                raise ValueError(f"{name}: has the model write text; use tools/eval_hf.py for it")
        self._tasks = tasks
        self._lm = ScoredLM(
            tokenizer_dir, max_length=config.seq_length, score=self._score, framing=framing
        )

    def _ask(self) -> dict[str, float]:
        from mone_megatron.evaluation.harness import run_tasks

        assert self._lm is not None
        assert self._tasks is not None
        try:
            scores = run_tasks(self._lm, self._tasks, limit=self.limit)
        except Exception as error:
            # The others wait for what is next, unless scoring itself has failed.
            if not self._scoring:
                _tell(f"{type(error).__name__}: {error}")
            raise
        _tell(_DONE)
        record: dict[str, float] = {}
        for score in scores:
            key = f"eval/{score.task}/{score.metric}"
            record |= {key: score.estimate.value, f"{key}_stderr": score.estimate.stderr}
        return record

    def _score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        """Has all ranks score; called on rank 0."""
        _tell(list(requests))
        self._scoring = True
        scores = self.scorer.score(requests)
        self._scoring = False
        return scores

    def _serve(self) -> None:
        """Scores until there is no more; called on the other ranks.

        Raises:
            RuntimeError: rank 0 could not go on.
        """
        while (message := _told()) is not _DONE:
            if isinstance(message, str):
                raise RuntimeError(f"train.eval_tasks failed on rank 0: {message}")
            self.scorer.score(message)


def _tell(message: list[ScoreRequest] | str | None) -> None:
    dist.broadcast_object_list([message], src=0)


def _told() -> Any:
    message: list[Any] = [None]
    dist.broadcast_object_list(message, src=0)
    return message[0]


@contextmanager
def _same_random_state() -> Iterator[None]:
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
