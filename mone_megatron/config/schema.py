"""Defines the configuration as typed data: the root, and the names of its groups.

A group is one file beside this one (``model.py``, ``train.py``, ...): its fields, each with its
bounds, default and documentation, and the rules of that group alone. Values are read from YAML and
the command line in :mod:`mone_megatron.config.load`; what crosses groups is checked in
:mod:`mone_megatron.config.checks`. The tables of ``docs/configuration.md`` are made from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mone_megatron.config.attention import MLAConfig, RopeScalingConfig
from mone_megatron.config.checkpoint import CheckpointConfig
from mone_megatron.config.data import DataConfig
from mone_megatron.config.device import DeviceConfig
from mone_megatron.config.group import Group
from mone_megatron.config.logging import AlertsConfig, LoggingConfig, WandbConfig
from mone_megatron.config.megatron import MegatronConfig
from mone_megatron.config.model import ModelConfig, QKNormScope
from mone_megatron.config.mone import MoNEConfig, MoNETarget, NeuronBalanceConfig
from mone_megatron.config.optim import OptimConfig
from mone_megatron.config.parallel import ParallelConfig
from mone_megatron.config.prediction import MTPConfig
from mone_megatron.config.router import RouterBalance, RouterConfig
from mone_megatron.config.run import RunConfig
from mone_megatron.config.train import TrainConfig

__all__ = [
    "AlertsConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "LoggingConfig",
    "MLAConfig",
    "MTPConfig",
    "MegatronConfig",
    "MoNEConfig",
    "MoNETarget",
    "ModelConfig",
    "NeuronBalanceConfig",
    "OptimConfig",
    "ParallelConfig",
    "QKNormScope",
    "RopeScalingConfig",
    "RouterBalance",
    "RouterConfig",
    "RunConfig",
    "TrainConfig",
    "WandbConfig",
]


@dataclass(frozen=True)
class Config(Group):
    """Holds the configuration of one run, whole."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mone: MoNEConfig = field(default_factory=MoNEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
