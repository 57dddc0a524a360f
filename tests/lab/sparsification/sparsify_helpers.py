"""What the tests of sparsification share: text, models and the tool."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hf_models import VOCABULARY
from transformers import PreTrainedModel

from mone_megatron.lab.sparsification.calibration import Calibration
from mone_megatron.lab.sparsification.engine import Text
from mone_megatron.lab.sparsification.kept_results import open_results
from mone_megatron.lab.sparsification.measured_study import layers_of
from mone_megatron.lab.sparsification.places import choose_targets
from mone_megatron.lab.sparsification.plans import Plan
from mone_megatron.lab.sparsification.resident import ResidentEngine
from mone_megatron.testing.tools import Main, load_tool

# A text that is on every machine.
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


def random_text(*, windows: int = 5, length: int = 16, batch_size: int = 2, seed: int = 0) -> Text:
    """Random tokens; the last window is shorter, the last batch smaller."""
    generator = np.random.default_rng(seed)
    sizes = [length + 1] * (windows - 1) + [length // 2]
    made = [generator.integers(VOCABULARY, size=size) for size in sizes]
    return Text("random", made, None, batch_size, None)


def engine_of(model: PreTrainedModel, *targets: str) -> ResidentEngine:
    """An engine on some targets, or those that the tool chooses."""
    return ResidentEngine(model, choose_targets(model, targets or None), seed=3)


def calibration_of(model: PreTrainedModel, text: Text, folder: Path, *targets: str) -> Calibration:
    """A calibration on some text, with nothing known before."""
    chosen = choose_targets(model, targets or None)
    engine = ResidentEngine(model, chosen, seed=3)
    results = open_results(folder / "calibration", {})
    return Calibration("model", text, tuple(layers_of(model, chosen)), lambda: engine, results)


def ignore(work: int) -> None:
    """Progress that nobody looks at."""


def losses(engine: ResidentEngine, plans: Sequence[Plan], text: Text) -> list[float]:
    """The loss under each plan."""
    return [found.perplexity.loss.value for _, found in engine.measure(plans, text, ignore)]


def load_sparsify_tool() -> Main:
    """``main`` of ``tools/sparsify_hf.py``."""
    return load_tool("sparsify_hf")
