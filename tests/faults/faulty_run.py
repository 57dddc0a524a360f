"""Training runs whose batches go wrong at chosen steps on one rank.

    python faulty_run.py JOBS.json

JOBS.json lists objects with ``overrides`` (Hydra), ``port`` (a fresh rendezvous for each),
``rank``, ``faults`` (step -> kind) and ``said``, the file for stderr. The exit codes are the last
line of stdout. A fault is a loss mask
that no dataset makes ("nan", "inf", "spike", "spike backwards"), or a NaN in one weight's gradient
("gradient"). The trainer itself is the real one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mone_megatron.config.load import compose
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.pretrain import pretrain


def _mask(kind: str, shape: torch.Size) -> torch.Tensor:
    mask = torch.ones(shape)
    if kind in ("nan", "inf"):
        mask[0, 0] = float(kind)
        return mask
    mask.zero_()
    # The difference of two tokens' losses, scaled up.
    first, second = (0, 1) if kind == "spike" else (1, 0)
    mask[0, first], mask[0, second] = 1000.0, -999.0
    return mask


def train(job: dict[str, Any]) -> int:
    import torch.distributed as dist

    from mone_megatron.data.loader import MicrobatchSampler
    from mone_megatron.model import builder
    from mone_megatron.train import run

    build_loader, build_chunk = run.build_loader, builder.DistributedDataParallel
    kind: str | None = None

    def faulty(dataset: Any, sampler: MicrobatchSampler, **options: Any) -> Iterator[Any]:
        nonlocal kind
        for number, batch in enumerate(build_loader(dataset, sampler, **options)):
            step = sampler.start_step + number // sampler.microbatches_per_step + 1
            kind = job["faults"].get(str(step)) if dist.get_rank() == job["rank"] else None
            if kind not in (None, "gradient"):
                batch["loss_mask"] = _mask(kind, batch["loss_mask"].shape)
            yield batch

    def with_faulty_gradient(*arguments: Any, **options: Any) -> Any:
        chunk = build_chunk(*arguments, **options)
        # A norm's: autograd hands no gradient to hooks of those that layers add in place.
        weights = dict(chunk.named_parameters())
        weight = next(weights[name] for name in weights if "layernorm" in name)
        weight.register_hook(lambda grad: grad * float("nan") if kind == "gradient" else grad)
        return chunk

    run.build_loader, builder.DistributedDataParallel = faulty, with_faulty_gradient
    try:
        return pretrain(compose(job["overrides"]))
    finally:
        run.build_loader, builder.DistributedDataParallel = build_loader, build_chunk


def main() -> None:
    # Before megatron-core is imported; see mone_megatron.pretrain.
    install_cpu_backend()
    codes = []
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        with Path(f"{job['said']}.{os.environ['RANK']}").open("w") as said:
            sys.stderr.flush()
            os.dup2(said.fileno(), 2)
            codes.append(train(job))
            sys.stderr.flush()
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
