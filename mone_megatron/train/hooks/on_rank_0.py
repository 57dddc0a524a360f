"""The hooks that write and show a run. They are on rank 0 only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook
from mone_megatron.train.hooks.console import ConsoleHook
from mone_megatron.train.hooks.metrics_file import MetricsFileHook
from mone_megatron.train.hooks.panel_files import PanelFilesHook
from mone_megatron.train.hooks.profile import ProfileHook
from mone_megatron.train.hooks.report import ReportHook
from mone_megatron.train.hooks.run_file import RunFileHook
from mone_megatron.train.hooks.showing import ShowingHook
from mone_megatron.train.hooks.tensorboard import TensorBoardHook
from mone_megatron.train.hooks.wandb_run import WandbHook
from mone_megatron.train.panel import Panel


@dataclass(frozen=True)
class Shown:
    """Holds what rank 0 writes and shows.

    Attributes:
        hooks: in the order in which they are told of a step; they end in reverse.
        panel: takes each panel; None where none is looked at.
    """

    hooks: list[Hook]
    panel: Callable[[Panel], None] | None


def hooks_on_rank_0(
    config: Config, folder: Path, facts: dict[str, Any], device: torch.device
) -> Shown:
    """Returns what writes and shows a run.

    Args:
        config: validated.
        folder: run.dir.
        facts: what is known before the first step, for run.json.
        device: that the run computes on.
    """
    run_file = RunFileHook(folder, facts, config)
    hooks: list[Hook] = []
    # Hooks end in reverse, so the report comes last: it reads the others' files.
    if config.logging.report:
        report = ReportHook(folder, config.logging.report_seconds)
        hooks.append(ShowingHook(report, "report.html or loss.png", run_file.note))
    tell = None
    if config.logging.wandb.mode != "disabled":
        hooks.append(wandb := WandbHook(config, folder, facts["id"]))
        tell = wandb.on_alerts
    if config.logging.tensorboard:
        tensorboard = TensorBoardHook(config, folder, step=facts["steps"])
        hooks.append(ShowingHook(tensorboard, "TensorBoard", run_file.note))
    panel = None
    if config.logging.layer_interval:
        hooks.append(files := PanelFilesHook(config, folder, step=facts["steps"], tell=tell))
        panel = files.add
    if config.train.profile:
        profile = ProfileHook(folder, config.train.profile, device)
        hooks.append(ShowingHook(profile, "the profile", run_file.note))
    console = ShowingHook(ConsoleHook(config), "progress", run_file.note)
    return Shown([*hooks, run_file, MetricsFileHook(folder), console], panel)
