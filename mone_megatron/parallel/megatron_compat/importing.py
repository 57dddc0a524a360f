"""Imports megatron-core, without what it imports for others, and mends it for any device."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
import warnings
from typing import Any

import torch

from mone_megatron.megatron_release import check_megatron_release
from mone_megatron.parallel.megatron_compat.checkpoint_forms import patch_checkpoint_results
from mone_megatron.parallel.megatron_compat.missing_transformer_engine import (
    patch_missing_transformer_engine,
)
from mone_megatron.parallel.megatron_compat.notices import keep_notices_quiet

# Packages that megatron-core imports for what a run of ours never asks of it: its timers and its
# inference engine would write to W&B. Importing it takes as long as a fifth of megatron-core.
DEFERRED = ("wandb",)
_deferred = threading.Lock()


class _ImportedWhenUsed(types.ModuleType):
    """Stands for an installed package until an attribute of it is read, and then imports it."""

    def __getattr__(self, name: str) -> Any:
        with _deferred:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def defer(package: str) -> None:
    """Lets an installed package that is not imported yet be imported when it is used."""
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        return
    module = _ImportedWhenUsed(package)
    # What Python reads of a module that is imported again, and those who look through all modules.
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    sys.modules[package] = module


def import_megatron(*, compile_fused: bool) -> None:
    """Imports megatron-core, quietly.

    Args:
        compile_fused: whether megatron-core's ``jit_fuser`` is torch.compile. It decorates small
            elementwise functions at import; on CPU compiling them takes minutes and gains
            nothing, so there it becomes the identity.

    Raises:
        ValueError: for a release that cannot train right.
    """
    check_megatron_release()
    compiler = torch.compile
    with warnings.catch_warnings():
        # "Transformer Engine/Apex not installed": what was chosen is printed by the run itself.
        warnings.simplefilter("ignore")
        try:
            if not compile_fused:
                torch.compile = lambda function, *args, **kwargs: function  # type: ignore
            for package in DEFERRED:
                defer(package)
            import megatron.core
            import megatron.core.models.gpt
            import megatron.core.optimizer  # noqa: F401
        finally:
            torch.compile = compiler
    patch_missing_transformer_engine()
    patch_checkpoint_results()
    keep_notices_quiet()
