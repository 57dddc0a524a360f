"""Runs the trainer briefly, each time in a process of its own, and says what its metrics show.

``python -m mone_megatron.lab.gpu_check.training WHAT FOLDER [--device D] [key=value ...]`` prints
JSON as its last line.
"""

from __future__ import annotations

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mone_megatron.command_line import Parser
from mone_megatron.lab.gpu_check.with_adam import Adam
from mone_megatron.planning.hardware import GPUS

_QUIET = ("logging.wandb.mode=disabled", "train.eval_interval=0")


def train(folder: Path, *overrides: str, adam: Adam | None = None) -> list[dict[str, float]]:
    """Trains in another process and returns the run's records.

    Args:
        folder: of the run.
        overrides: settings of it.
        adam: whose Adam to use; None for the one that megatron-core finds first.

    Raises:
        RuntimeError: it failed; with what it said last.
    """
    trainer = ["mone_megatron.pretrain"]
    if adam is not None:
        trainer = ["mone_megatron.lab.gpu_check.with_adam", adam]
    command = [sys.executable, "-m", *trainer, *_QUIET, *overrides]
    done = subprocess.run([*command, f"run.dir={folder}"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"training failed: {done.stderr[-3000:]}")
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _apart(first: list[dict[str, float]], second: list[dict[str, float]], key: str) -> float:
    pairs = zip(first, second, strict=True)
    return max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-12) for a, b in pairs)


def agree(folder: Path, device: str, overrides: list[str]) -> tuple[dict[str, Any], bool]:
    """Trains five steps in fp32 on the CPU and on ``device``: the same losses are wanted."""
    steps = ("experiment=tiny_mone", "train.steps=5", "device.dtype=fp32", *overrides)
    on_cpu = train(folder / "cpu", *steps, "device.kind=cpu")
    there = train(folder / device, *steps, f"device.kind={device}")
    loss, norm = (_apart(on_cpu, there, key) for key in ("loss", "grad_norm"))
    found = {"losses apart": loss, "gradient norms apart": norm}
    found["last loss"] = there[-1]["loss"]
    return found, loss < 1e-4


def resume(
    folder: Path, device: str, overrides: list[str], *, adam: Adam = "torch"
) -> tuple[dict[str, Any], bool]:
    """Trains six steps, and the last three again from a checkpoint written beside training."""
    common = ("experiment=tiny_mone", f"device.kind={device}", "checkpoint=auto",
              "checkpoint.interval=3", "checkpoint.async_save=true", *overrides)  # fmt: skip
    straight = train(folder / "straight", *common, "train.steps=6", adam=adam)
    saved = folder / "straight" / "checkpoints" / "step_00000003"
    resumed = (*common, "train.steps=6", f"checkpoint.resume={saved}")
    again = train(folder / "again", *resumed, adam=adam)
    apart = _apart(straight[3:], again[-3:], "loss")
    bits = all(a["loss"] == b["loss"] for a, b in zip(straight[3:], again[-3:], strict=True))
    return {"equal to the last bit": bits, "losses apart": apart}, apart < 1e-3


def graphs(folder: Path, device: str, overrides: list[str]) -> tuple[dict[str, Any], bool]:
    """Trains eight steps, and again with attention as CUDA graphs after two: the same is wanted."""
    steps = ("experiment=tiny_mone", "train.steps=8", f"device.kind={device}", *overrides)
    field = "megatron.transformer.cuda_graph"
    asked = (f"{field}_impl=transformer_engine", f"{field}_warmup_steps=2")
    without, graphed = train(folder / "without", *steps), train(folder / "graphs", *steps, *asked)
    loss, norm = (_apart(without, graphed, key) for key in ("loss", "grad_norm"))
    seconds = [records[-1]["step_seconds"] for records in (without, graphed)]
    found = {"losses apart": loss, "gradient norms apart": norm, "seconds of a step": seconds}
    return found, loss < 1e-3


def speed(folder: Path, device: str, overrides: list[str]) -> tuple[dict[str, Any], bool]:
    """Measures a configuration's steps: seconds, tokens a second, the share of the GPU's peak."""
    records = train(folder / "run", f"device.kind={device}", *overrides)
    # The first compile kernels and fill caches.
    measured = records[len(records) // 2 :]
    median = {
        key: statistics.median(record[key] for record in measured)
        for key in ("step_seconds", "tokens_per_second", "tflops_realised", "tflops_ideal")
    }
    facts = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {**median, "loss": records[-1]["loss"], "hardware": facts["hardware"]}
    for name, gpu in GPUS.items():
        if name in facts["hardware"]:
            found["MFU"] = median["tflops_ideal"] * 1e12 / gpu.bf16_flops
    return found, True


def waits(folder: Path, device: str, overrides: list[str]) -> tuple[dict[str, Any], bool]:
    """Counts how often the host waited for the GPU in the trainer's steps, as CUDA counts."""
    import torch

    steps, settings = {"few": 4, "many": 8}, ("experiment=tiny_mone", *overrides)
    if device != "cuda":
        raise RuntimeError("only CUDA counts")
    counts = {}
    for name, number in steps.items():
        torch.cuda.set_sync_debug_mode("warn")
        sys.argv = ["pretrain", *_QUIET, *settings, "device.kind=cuda", f"train.steps={number}",
                    "logging.layer_interval=0", f"run.dir={folder / name}"]  # fmt: skip
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                runpy.run_module("mone_megatron.pretrain", run_name="__main__")
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"training ended with {ended.code}") from None
        counts[name] = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)
        )
    extra = steps["many"] - steps["few"]
    few, many = counts["few"], counts["many"]
    lines = {place: (many[place] - few[place]) / extra for place in many}
    by_line = {place: count for place, count in lines.items() if count}
    return {"waits a step": sum(by_line.values()), "by line": by_line}, True


CHECKS: dict[str, Callable[[Path, str, list[str]], tuple[dict[str, Any], bool]]] = {
    "agree": agree,
    "resume": resume,
    "resume_te": partial(resume, adam="transformer_engine"),
    "graphs": graphs,
    "speed": speed,
    "waits": waits,
}


def main() -> int:
    """Prints what was found; returns 1 when it is not what it has to be."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.folder.mkdir(parents=True, exist_ok=True)
    # A folder of an earlier check holds checkpoints, from which training would go on.
    folder = Path(tempfile.mkdtemp(prefix="run_", dir=options.folder))
    found, good = CHECKS[options.what](folder, options.device, options.overrides)
    print(json.dumps(found))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
