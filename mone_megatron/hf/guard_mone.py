"""Refuses to run a model whose experts or MLPs are computed by something that does not select.

Libraries replace modules or their forward methods for speed, and would give the answer of a model
that keeps all neurons without a word. A watched module must be there when its model runs, and must
have selected when it has run.

This file is copied into exported models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What a watched module holds: whether its settings ask for a selection, and whether the last call
# made one.
_SELECTS, _SELECTED = "_selects_neurons", "_neurons_selected"
# What a guarded model holds: the names of its watched modules.
_NAMES = "_watched_modules"


def watch(module: nn.Module, selects: Callable[[Any], bool]) -> None:
    """Makes a module raise when it was called and did not select neurons; may be called again.

    Args:
        module: the experts of a layer, or an MLP.
        selects: is told the module; returns whether its settings ask for a selection now.
    """
    if not _is_watched(module):
        module.register_forward_pre_hook(_forget)
        module.register_forward_hook(_check_selected)
    setattr(module, _SELECTS, selects)


def note_selected(module: nn.Module) -> None:
    """Notes that a module computes its selection, or rightly has none to compute."""
    # A compiled module runs what was checked while it was traced.
    if not torch.compiler.is_dynamo_compiling():
        setattr(module, _SELECTED, True)


def guard(model: nn.Module, asked: Callable[[Any], bool]) -> None:
    """Makes a model raise when one of its watched modules was replaced; may be called again.

    Args:
        model: what holds them.
        asked: is told a watched module; returns whether the settings ask for a selection in it. The
            others may be computed by anything.
    """
    if not hasattr(model, _NAMES):
        model.register_forward_pre_hook(_check_present)
    watched = [(name, module) for name, module in model.named_modules() if _is_watched(module)]
    setattr(model, _NAMES, tuple(name for name, module in watched if asked(module)))


def refuse_replaced(module: nn.Module, name: str) -> None:
    """Refuses a module in the place of a watched one, unless it is a wrapper around one.

    Raises:
        ValueError: it is another module; the message names it.
    """
    # Pipelines leave an identity where another rank computes.
    if isinstance(module, nn.Identity) or any(map(_is_watched, module.modules())):
        return
    raise ValueError(
        f"{name}: replaced by {_named(type(module))}, which does not select neurons (config.mone), "
        "so the answer would be another model's; run it without what replaces modules (quantized "
        "or fused experts, another engine's)"
    )


def _is_watched(module: nn.Module) -> bool:
    return hasattr(module, _SELECTS)


def _named(what: Any) -> str:
    return f"{what.__module__}.{what.__qualname__}"


def _forget(module: nn.Module, inputs: Any) -> None:
    if not torch.compiler.is_dynamo_compiling():
        setattr(module, _SELECTED, False)


def _check_selected(module: nn.Module, inputs: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling() or getattr(module, _SELECTED):
        return
    if getattr(module, _SELECTS)(module):
        forward = getattr(module.forward, "__func__", module.forward)
        raise ValueError(
            f"{type(module).__name__}: computed by {_named(forward)}, which does not select "
            "neurons (config.mone), so the answer would be another model's; run it without what "
            "replaces forward methods (fused kernels, another engine's)"
        )


def _check_present(model: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    for name in getattr(model, _NAMES):
        place = model
        for part in name.split("."):
            if not isinstance(inner := getattr(place, part, None), nn.Module):
                break
            place = inner
        refuse_replaced(place, f"{type(model).__name__}.{name}")
