"""Keeps megatron-core's notices that are harmless here off the terminal."""

from __future__ import annotations

import functools
import logging
import warnings

# (module, what its line begins with, since when or until when): notices that are harmless here, and
# what for. They would stand on the terminal once a process, a layer or a save.
NOTICES: tuple[tuple[str, str, str], ...] = (
    # Modules of ours get default process groups, which are the ones we want.
    ("transformer.transformer_layer", "Unknown MLP type", "0.16"),
    # A spec is taken for what it is.
    ("transformer.transformer_layer", "Rewrapping ModuleSpec", "0.19"),
    # In favour of HybridModel, which is another class of the same layers.
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED", "0.19"),
    # It is computed inside, as before.
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout", "0.19"),
    # Checkpoints of 0.16 are read through it.
    ("dist_checkpointing.strategies.common", "load_common is deprecated", "0.19"),
    # Its writer is not used, only what it prepares.
    ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated", "0.19"),
)


def _says_something_else(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def keep_notices_quiet() -> None:
    """Filters warnings and notices of the library that would be given once per process."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS")
    warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`save_state_dict` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*reduce_scatter_tensor.*deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*deprecated", FutureWarning)
    # 0.19 imports this class of another kind of model where it makes any optimizer.
    warnings.filterwarnings("ignore", "MimoModelConfig is experimental")
    # Reading the common state of a checkpoint (0.19), by one rank for itself, which is meant.
    warnings.filterwarnings("ignore", "The argument order of load has been changed")
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    for module, start, _ in NOTICES:
        logging.getLogger(f"megatron.core.{module}").addFilter(
            functools.partial(_says_something_else, start)
        )
