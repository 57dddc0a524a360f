"""A builder of run directories as a training run writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

RunBuilder = Callable[..., Path]

ROUTER_MEAN = 64.0


def layer_values(step: int, layer: int, mone: bool) -> dict[str, float]:
    """Plausible utilisation of one layer, different for every layer and step."""
    phase = math.sin(0.07 * step + layer)
    values = {
        "router/tokens_per_expert_min": ROUTER_MEAN * (0.5 + 0.1 * phase),
        "router/tokens_per_expert_mean": ROUTER_MEAN,
        "router/tokens_per_expert_max": ROUTER_MEAN * (1.6 - 0.2 * phase),
        "router/tokens_per_expert_std": 12 + 3 * phase,
        "router/dead_experts": float(layer == 2 and step < 50),
    }
    if mone:
        values |= {
            "mone/load_entropy": 0.93 + 0.04 * phase - 0.2 * math.exp(-step / 60),
            "mone/dead_neuron_share": 0.02 + 0.3 * math.exp(-step / 40) + 0.001 * layer,
            "mone/load_max_over_mean": 2.5 + phase,
            "mone/mass_kept": 0.62 + 0.1 * (1 - math.exp(-step / 80)) + 0.01 * phase,
        }
    return values


def build_run(
    directory: Path,
    *,
    name: str = "tiny",
    steps: int = 40,
    layers: int = 2,
    mone: bool = True,
    seed: int = 1234,
    status: str = "completed",
    offset: float = 0.0,
    loss: Callable[[int], float] | None = None,
    layer_interval: int = 10,
    eval_interval: int = 10,
    step_seconds: float = 0.5,
    fingerprint: str = "sha256:abc",
    seq_length: int = 64,
    global_batch_size: int = 8,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory and return it; `loss` gives the exact loss of a step."""
    directory.mkdir(parents=True)
    noise = np.random.default_rng(seed)
    tokens = seq_length * global_batch_size
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            trend = 2.2 + 4.2 * math.exp(-step / (0.17 * max(steps, 12))) + offset
            record: dict[str, Any] = {
                "step": step,
                "loss": loss(step) if loss else trend + 0.06 * float(noise.normal()),
                "lr": 3e-4 * min(1.0, step / 10),
                "grad_norm": 1.0 + 3 * math.exp(-step / 20) + 0.1 * float(noise.random()),
                "tokens": step * tokens,
                "tokens_per_second": tokens / step_seconds,
                "step_seconds": step_seconds * (4 if step == 1 else 1),
                "tflops_realised": 0.02,
                "tflops_ideal": 0.03,
                "router/load_balancing_loss": 1.0 + 0.5 * math.exp(-step / 20),
                "router/z_loss": 2.0 + 0.1 * math.sin(step),
            }
            if mone:
                record["mone/balance_loss"] = 1.0 + 0.8 * math.exp(-step / 15)
            if eval_interval and (step % eval_interval == 0 or step == steps):
                record["val_loss"] = loss(step) + 0.5 if loss else trend + 0.08
            if layer_interval and step % layer_interval == 0:
                rows = [layer_values(step, layer, mone) for layer in range(1, layers + 1)]
                for layer, row in enumerate(rows, start=1):
                    record |= {f"{key}/layer_{layer}": value for key, value in row.items()}
                record |= {key: sum(row[key] for row in rows) / layers for key in rows[0]}
            file.write(json.dumps(record) + "\n")
    resolved: dict[str, Any] = {
        "run": {"name": name, "dir": str(directory)},
        "model": {"num_layers": layers, "num_experts": 8},
        "mone": {"enabled": mone, "keep_ratio": 0.25},
        "optim": {"lr": 3e-4},
        "train": {
            "steps": steps,
            "seed": seed,
            "seq_length": seq_length,
            "global_batch_size": global_batch_size,
        },
        "logging": {"layer_interval": layer_interval},
    }
    for group, values in (config or {}).items():
        resolved.setdefault(group, {}).update(values)
    (directory / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    summary = {
        "name": name,
        "status": status,
        "world_size": 2,
        "device": "cpu",
        "hardware": "2 x CPU",
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
        "data_fingerprint": fingerprint,
        "vocab_size": 4096,
        "parameters": {
            "total": 12_345_678,
            "activated_gate_counted": 5_000_000 if mone else 7_000_000,
            "activated_neurons_only": 4_000_000 if mone else 7_000_000,
        },
        "flops_per_step": {"ideal": 1.5e10, "realised": 2e10},
        "seed": seed,
        "started": "2025-01-02T03:04:05+00:00",
        "seconds": steps * step_seconds,
        "tokens": steps * tokens,
    }
    (directory / "run.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


@pytest.fixture
def make_run(tmp_path: Path) -> RunBuilder:
    """``make_run("folder", **options)`` builds a run under the test's own folder."""

    def make(folder: str, **options: Any) -> Path:
        return build_run(tmp_path / folder, **options)

    return make
