"""Loads any model as one of transformers: an export, a Hugging Face folder, a run, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mone_megatron.data.framing import Framing
from mone_megatron.hf.architectures import FUSED, MONE
from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.export import check_complete, hf_config, hf_tensors
from mone_megatron.hf.mapping import rules
from mone_megatron.hf.modeling_mone import MoneForCausalLM
from mone_megatron.hf.source import Source, is_ours, open_source
from mone_megatron.hf.text_format import follow, framing_of_folder


@dataclass(frozen=True)
class LoadedModel:
    """Holds a model that can be evaluated."""

    # In evaluation mode.
    model: PreTrainedModel
    # A transformers tokenizer that begins texts as in the model's training; None when the folder
    # has none.
    tokenizer: Any
    # Where it came from, for people.
    source: str
    # The special tokens around the documents that it was trained on; None without a tokenizer.
    framing: Framing | None = None


def _silent(message: str) -> None:
    """Says nothing."""


def load_model(
    where: str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = _silent,
) -> LoadedModel:
    """Loads a model, whatever it is stored as.

    Args:
        where: a folder: an export of ours, any transformers model, a run (its newest checkpoint
            that verifies) or one checkpoint; or a model's name on the Hub.
        dtype: of the weights; None for their own. ``fp32`` takes a checkpoint's masters.
        device: as torch names it.
        trust_remote_code: whether to run code that lies beside the weights (exports of ours need
            none here).
        say: is told what was chosen.

    Raises:
        ValueError: nothing there, or something that cannot be loaded; one line.
    """
    folder = Path(where)
    if folder.is_dir() and is_ours(folder):
        source = open_source(folder, say=say)
        model = build_from_checkpoint(source, dtype)
        tokenizer = None
        if (source.tokenizer_dir / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_dir)
            follow(tokenizer, source.framing)
        name = f"{source.config.run.name} after step {source.checkpoint.step}"
        framing = None if tokenizer is None else source.framing
        return LoadedModel(_ready(model, device), tokenizer, name, framing)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{where}: is neither a run, a checkpoint nor a model (no config.json)")
    try:
        # Our own class by its name: the copy beside the weights is not needed.
        known = folder.is_dir() and _model_type(folder) == MoneConfig.model_type
        loader = MoneForCausalLM if known else AutoModelForCausalLM
        extra: dict[str, Any] = {} if known else {"trust_remote_code": trust_remote_code}
        loaded = loader.from_pretrained(where, dtype=dtype or "auto", **extra)
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: cannot be loaded ({reason})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    assert isinstance(loaded, PreTrainedModel)
    framing = None
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        framing = framing_of_folder(folder, tokenizer.backend_tokenizer, tokenizer.eos_token_id)
        follow(tokenizer, framing)
    return LoadedModel(_ready(loaded, device), tokenizer, where, framing)


def _ready(model: PreTrainedModel, device: str) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    model.eval()
    return model


def _model_type(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder)
    return str(config.model_type)


def build_from_checkpoint(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds in memory the transformers model that a checkpoint's export would load as.

    ``dtype`` is the weights'; None takes that of most weights.

    Raises:
        ValueError: see :func:`~mone_megatron.hf.export.check_complete`.
    """
    dtype = dtype or source.dtype
    architecture = source.architecture
    config = hf_config(source, architecture, dtype)
    table = list(rules(source.model, source.vocab_size, architecture, FUSED, source.mone))
    check_complete(source, table)
    if architecture is MONE:
        model: PreTrainedModel = MoneForCausalLM._from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in hf_tensors(source, table, dtype):
            # The stock Mixtral names its block as checkpoints do not.
            targets[name.replace(".block_sparse_moe.", ".mlp.")].copy_(tensor)
    return model
