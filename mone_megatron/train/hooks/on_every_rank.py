"""The hooks that measure, evaluate and save a run. They are on every rank, in the same order."""

from __future__ import annotations

from collections.abc import Callable

from mone_megatron.methods.hook import Hook
from mone_megatron.train.evaluate.tasks import TaskEvaluation
from mone_megatron.train.hooks.auxiliary_losses import AuxiliaryLossHook
from mone_megatron.train.hooks.density import density_hooks
from mone_megatron.train.hooks.keep_ratio import KeepRatioHook
from mone_megatron.train.hooks.panel import PanelHook
from mone_megatron.train.hooks.prediction_losses import PredictionLossHook
from mone_megatron.train.hooks.saving import SavingHook
from mone_megatron.train.hooks.tasks import TaskHook
from mone_megatron.train.hooks.throughput import ThroughputHook
from mone_megatron.train.hooks.validation import ValidationHook
from mone_megatron.train.panel import Panel
from mone_megatron.train.session import Session


def hooks_on_every_rank(
    session: Session,
    *,
    tasks: TaskEvaluation | None = None,
    show_panel: Callable[[Panel], None] | None = None,
) -> list[Hook]:
    """Returns the hooks that the configuration of a run asks for, without those of ``train.hooks``.

    Args:
        session: the run.
        tasks: to run meanwhile; None for none.
        show_panel: is given each panel; None on the ranks that show nothing.
    """
    config, device = session.config, session.device.torch_device
    hooks: list[Hook] = []
    if session.checkpointer is not None:
        hooks.append(SavingHook(config, session.checkpointer, session.stepper, device))
    hooks += [
        ThroughputHook(config, session.layout, session.vocab_size),
        AuxiliaryLossHook(config, session.layout, device),
        KeepRatioHook(config.mone, session.state.chunks),
        PanelHook(config, session.state.chunks, device, show_panel),
    ]
    for section, steering in density_hooks(config, session.state.chunks, device).items():
        hooks.append(steering)
        if session.checkpointer is not None:
            session.checkpointer.keep(section, steering)
    if config.model.mtp.depth:
        hooks.append(PredictionLossHook(config, session.layout, device))
    if session.validation is not None:
        hooks.append(ValidationHook(config.train, session.stepper, session.validation))
    if tasks is not None:
        hooks.append(TaskHook(config.train, tasks))
    return hooks
