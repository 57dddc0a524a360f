"""The hooks that write and show a run. They are on rank 0 only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mone_megatron.config.schema import Config
from mone_megatron.train.hooks.console import ConsoleHook
from mone_megatron.train.hooks.hook import Hook
from mone_megatron.train.hooks.metrics_file import MetricsFileHook
from mone_megatron.train.hooks.panel_files import PanelHook
from mone_megatron.train.hooks.profile import ProfileHook
from mone_megatron.train.hooks.report import ReportHook
from mone_megatron.train.hooks.run_file import RunFileHook
from mone_megatron.train.hooks.showing import ShowingHook
from mone_megatron.train.hooks.wandb_run import WandbHook


def build_hooks(
    config: Config, folder: Path, facts: dict[str, Any], device: torch.device
) -> list[Hook]:
    """The hooks of rank 0. They end in reverse, so the report comes last: it reads the others'."""
    run_file = RunFileHook(folder, facts)
    hooks: list[Hook] = []
    if config.logging.report:
        hooks.append(ShowingHook(ReportHook(folder), "report.html or loss.png", run_file.note))
    tell = None
    if config.logging.wandb.mode != "disabled":
        hooks.append(wandb := WandbHook(config, folder, facts["id"]))
        tell = wandb.on_alerts
    if config.logging.layer_interval:
        hooks.append(PanelHook(config, folder, step=facts["steps"], tell=tell))
    if config.train.profile:
        profile = ProfileHook(folder, config.train.profile, device)
        hooks.append(ShowingHook(profile, "the profile", run_file.note))
    console = ShowingHook(ConsoleHook(config), "progress", run_file.note)
    return [*hooks, run_file, MetricsFileHook(folder), console]
