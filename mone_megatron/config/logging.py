"""Defines the group ``logging``: what a run shows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mone_megatron.config.group import Group, all_but
from mone_megatron.config.marks import Above, AtLeast, NotEmpty, Within
from mone_megatron.config.resources import is_installed


@dataclass(frozen=True)
class AlertsConfig(Group):
    """Says when a run warns of experts and neurons that stop working (docs/metrics.md#alerts)."""

    enabled: bool = True
    """Judge what is logged every `logging.layer_interval` steps (docs/metrics.md#alerts)."""
    patience: Annotated[int, AtLeast(1)] = 5
    """An alert begins, and ends, when so many of these steps in a row say so."""
    dead_expert: Annotated[float, Within("[0, 1]")] = 0.05
    """Alert for an expert with less than this part of a fair share of the tokens; 0 for none."""
    dead_neurons: Annotated[float, Within("[0, 1]")] = 0.5
    """Alert for an expert of whose neurons more than this share is never kept; 1 for none."""
    load_collapse: Annotated[float, Within("[0, 1]")] = 0.1
    """Alert when the load of a router's experts, or of an expert's neurons, is spread by less than
    this (0: always the same, 1: even); 0 for none."""
    shrinking_weights: Annotated[float, Within("[0, 1]")] = 0.5
    """Alert when mean |a| fell by more than this part while the raw balance loss fell and the load
    became no more even; 1 for none."""

    def unread(self) -> Mapping[str, str]:
        """Returns what judges where nothing is judged."""
        if self.enabled:
            return {}
        return all_but(self, ["enabled"], "logging.alerts.enabled=false")


@dataclass(frozen=True)
class WandbConfig(Group):
    """Says how a run reports to Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """Where W&B writes; `disabled` does not even import the package."""
    project: Annotated[str, NotEmpty()] = "mone_megatron"
    """The project that runs appear in."""
    entity: str = ""
    """The user or team that owns the project; "" for the user's default."""
    group: str = ""
    """Runs of one comparison share a group; the shipped pairs and ablations set it."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    timeout_seconds: Annotated[float, Above(0)] = 30.0
    """The longest wait for the server at the start (then offline) and at the end (then
    unfinished)."""

    def unread(self) -> Mapping[str, str]:
        """Returns what W&B is told where it is not used."""
        if self.mode != "disabled":
            return {}
        return all_but(self, ["mode"], "logging.wandb.mode=disabled")

    def boundless(self) -> Collection[str]:
        """Returns the project where W&B is not used."""
        return ("project",) if self.mode == "disabled" else ()


@dataclass(frozen=True)
class LoggingConfig(Group):
    """Says what a run shows, and how often."""

    interval: Annotated[int, AtLeast(1)] = 1
    """Print (lines) and send to W&B every so many steps; metrics.jsonl gets every step."""
    layer_interval: Annotated[int, AtLeast(0)] = 10
    """Neuron and expert utilisation of each layer, every so many steps; 0 for never."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """`auto` draws a bar on a terminal and prints lines elsewhere."""
    report: bool = True
    """Write loss.png and report.html at the end."""
    report_seconds: Annotated[float, AtLeast(0)] = 30.0
    """Write report.html of the running run so often, in a process of its own that takes a hundredth
    of the time at most; an open page reads itself again. 0 for at the end alone."""
    tensorboard: bool = False
    """Write event files for TensorBoard under run.dir/tensorboard."""
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def unread(self) -> Mapping[str, str]:
        """Returns how often the report is written where there is none, and alerts of nothing."""
        unread = {} if self.report else {"report_seconds": "logging.report=false"}
        if self.layer_interval == 0:
            unread["alerts"] = "logging.layer_interval=0"
        return unread

    def boundless(self) -> Collection[str]:
        """Returns how often the report is written where there is none."""
        return () if self.report else ("report_seconds",)

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if self.tensorboard and not is_installed("tensorboard"):
            yield (
                "logging.tensorboard: needs the package tensorboard, which is not installed; "
                "pip install 'mone_megatron[tensorboard]', or leave it false"
            )
