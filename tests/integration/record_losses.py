"""Records what 20 steps of the tiny experiments compute, for later versions to be held against.

    python tests/integration/record_losses.py

writes ``recorded_losses.json`` beside this file: run it when a change is meant to change what is
computed, and say so in the commit. What the recorded numbers are compared with is trained by
``test_layouts_agree.py`` anyway.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.layouts import LAYOUTS
from mone_megatron.testing.words import write_words

RECORDED = Path(__file__).with_name("recorded_losses.json")
SETTINGS = (
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "logging.layer_interval=1",
)
# Experiment, processes, layout.
RUNS = (("tiny_moe", 1, "one"), ("tiny_mone", 1, "one"), ("tiny_mone", 2, "ep2"))

Records = list[dict[str, float]]


def prepare_corpus(folder: Path) -> tuple[str, ...]:
    """The same text on every machine and Python, and the settings to train on it."""
    text = write_words(folder / "words.jsonl")
    preprocess_files([text], folder / "corpus", TokenizerSettings(train_vocab_size=512))
    return ("data.source=indexed", f"data.paths=[{folder / 'corpus'}]")


def read_records(run: Path) -> Records:
    """One object a step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def essence(records: Sequence[dict[str, float]]) -> Records:
    """What is recorded of each step: the loss, the gradient norm, and how experts and neurons were
    used, which tells a choice that fell otherwise by rounding.
    """
    return [
        {
            "step": record["step"],
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "router/tokens_per_expert": _sum(record, "router/tokens_per_expert_std/"),
            "mone/load_entropy": _sum(record, "mone/load_entropy/"),
        }
        for record in records
    ]


def _sum(record: dict[str, float], prefix: str) -> float:
    return math.fsum(value for key, value in record.items() if key.startswith(prefix))


def main() -> int:
    """Trains and writes."""
    recorded = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = prepare_corpus(folder)
        for experiment, processes, name in RUNS:
            run = f"{experiment}_{name}"
            job = (f"experiment={experiment}", *SETTINGS, *corpus, *LAYOUTS[processes][name])
            run_layouts({run: job}, processes=processes, folder=folder)
            recorded[f"{experiment} {name}"] = essence(read_records(folder / run))
    content = {"written by": "python tests/integration/record_losses.py", "runs": recorded}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RECORDED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
