"""Training runs that write down which samples they were given, or save what they took up.

    python recorded_run.py JOBS.json

with torchrun's variables set. JOBS.json lists objects with ``overrides`` (Hydra) and ``port`` (a
fresh rendezvous for each run); ``samples``, a folder in which each rank writes one line for each
microbatch that its loader hands out, step and sample numbers; and ``save_at_start``: whether to
save once before the first step. The trainer itself is the real one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mone_megatron.config.load import compose
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.pretrain import pretrain


class NumberedSamples:
    """A dataset whose samples carry their number, through loader processes too."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        return {**self.dataset[index], "number": torch.tensor(index)}


def recording(build_loader: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """A loader that writes down what it hands out, and hands it out without the numbers."""

    def build(dataset: Any, sampler: Any, **options: Any) -> Iterator[Any]:
        batches = build_loader(NumberedSamples(dataset), sampler, **options)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{os.environ['RANK']}").open("a", buffering=1) as lines:
            for number, batch in enumerate(batches):
                step = sampler.start_step + number // sampler.microbatches_per_step + 1
                lines.write(json.dumps([step, batch.pop("number").tolist()]) + "\n")
                yield batch

    return build


def saving_first(train: Callable[..., Any]) -> Callable[..., Any]:
    """The training loop after a save of where it starts from."""

    def save_and_train(session: Any) -> Any:
        session.checkpointer.save(session.start)
        return train(session)

    return save_and_train


def run_job(job: dict[str, Any]) -> int:
    from mone_megatron.data import loader
    from mone_megatron.train import run

    with ExitStack() as patches:
        if job.get("samples"):
            patches.enter_context(patch.object(loader, "_KEYS", (*loader._KEYS, "number")))
            wrapped = recording(run.build_loader, Path(job["samples"]))
            patches.enter_context(patch.object(run, "build_loader", wrapped))
        if job.get("save_at_start"):
            patches.enter_context(patch.object(run, "train", saving_first(run.train)))
        return pretrain(compose(job["overrides"]))


def main() -> int:
    # Before megatron-core is imported; see mone_megatron.pretrain.
    install_cpu_backend()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        code = run_job(job)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
