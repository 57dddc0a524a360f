"""What the tests of scoring run on every rank."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from mone_megatron.config.schema import TrainConfig
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.testing.trainer import build_trainer
from mone_megatron.train.evaluate.scoring import Scorer, token_scores
from mone_megatron.train.evaluate.tasks import TaskEvaluation


def sharded_scores(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`token_scores` of this rank's columns."""
    group = dist.group.WORLD
    assert group is not None
    mine = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone()
    return token_scores(mine, labels, vocab_size, group)


def error_of_tasks(tasks: tuple[str, ...]) -> str:
    """What loading and running ``tasks`` raises on this rank, on a model of its own."""
    overrides = ["experiment=tiny_mone", "train.global_batch_size=4", "parallel.expert=2"]
    trainer = build_trainer(overrides, data_fingerprint="none")
    scorer = Scorer(
        trainer.config,
        trainer.layout,
        trainer.stepper.device,
        trainer.state,
        vocab_size=300,
        progress=lambda message: None,
    )
    config = TrainConfig(eval_tasks=tasks, eval_tasks_interval=1, seq_length=64)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_tokenizer(["some text"], 300), Path(folder))
        try:
            TaskEvaluation(config, Path(folder), scorer).run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"
