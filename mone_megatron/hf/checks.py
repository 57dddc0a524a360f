"""Checks a conversion at its end: both models on real text, in fp32, in this process."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mone_megatron.data.stdlib import stdlib_files
from mone_megatron.data.tokenizer import load_tokenizer
from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.importing import load_hf_config
from mone_megatron.hf.megatron_forward import MegatronForward, megatron_forward
from mone_megatron.hf.modeling_mone import MoneForCausalLM
from mone_megatron.hf.source import Source, open_source
from mone_megatron.hf.verify import Comparison, LayerChoices, compare, hf_logits_and_choices

# 1,024 tokens in short sequences: see verify.py for why short.
_SEQUENCES, _LENGTH = 16, 64
_BATCH = 4
# About what the sequences need, whatever the tokenizer.
_MEGABYTES = 0.2


def real_tokens(tokenizer_dir: Path, *, sequences: int, length: int) -> Tensor:
    """Returns tokens of the Python standard library's source, int64 ``[sequences, length]``.

    Raises:
        ValueError: there is no tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_dir).tokenizer
    root = Path(sysconfig.get_path("stdlib"))
    ids: list[int] = []
    for path in stdlib_files(root, _MEGABYTES):
        text = (root / path).read_text(encoding="utf-8", errors="ignore")
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= sequences * length:
            break
    if not ids:
        raise ValueError(f"{tokenizer_dir}: its tokenizer makes nothing of {root}")
    while len(ids) < sequences * length:
        ids += ids
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def check_export(source: Source, folder: Path, *, dtype: torch.dtype | None) -> Comparison:
    """Compares a checkpoint's Megatron model with an export of it, loaded from its files.

    Args:
        source: the checkpoint.
        folder: the export.
        dtype: what it was exported in; None when each tensor kept its own. Both models have the
            weights of that dtype, so rounding them is no difference.

    Raises:
        ValueError: no tokenizer, or one that transformers reads in another way; a file that
            cannot be loaded.
    """
    check_tokenizer(folder)
    return _compare(source, load_for_check(folder), dtype=dtype)


def check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer of which ``AutoTokenizer`` makes another one.

    Raises:
        ValueError: the tokens of a text differ.
    """
    ours = load_tokenizer(folder).tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    text = Path(__file__).read_text(encoding="utf-8") + "\n \tdéjà vu 漢字 12,345 it's\r\n"
    expected = ours.encode(text, add_special_tokens=False).ids
    if theirs(text, add_special_tokens=False)["input_ids"] != expected:
        raise ValueError(
            f"{folder}: AutoTokenizer makes a {type(theirs).__name__} of the tokenizer, which "
            "gives other tokens; set tokenizer_class in its tokenizer_config.json"
        )


def check_import(
    checkpoint: Path, folder: Path, *, choices: bool, dtype: torch.dtype | None = None
) -> Comparison:
    """Compares an imported checkpoint's Megatron model with the Hugging Face model it came from.

    Args:
        checkpoint: what the import wrote.
        folder: the Hugging Face model.
        choices: whether to compare experts and neurons, too; not when the import made the experts.
        dtype: what it was imported in; None when each tensor kept its own. Both models have the
            weights of that dtype, so rounding them is no difference.

    Raises:
        ValueError: no tokenizer; a file that cannot be loaded.
    """
    source = open_source(checkpoint, say=lambda message: None)
    model = load_for_check(folder)
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return _compare(source, model, dtype=None, choices=choices)


def load_for_check(folder: Path) -> PreTrainedModel:
    """Loads a transformers model in fp32; no code but ours and the library's runs."""
    config = load_hf_config(folder)
    loader = MoneForCausalLM if isinstance(config, MoneConfig) else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval()


def _compare(
    source: Source, model: PreTrainedModel, *, dtype: torch.dtype | None, choices: bool = True
) -> Comparison:
    length = min(_LENGTH, source.config.train.seq_length)
    tokens = real_tokens(source.tokenizer_dir, sequences=_SEQUENCES, length=length)
    with megatron_forward(source, dtype=dtype) as ours:
        parts = [_both(ours, model, part, choices=choices) for part in tokens.split(_BATCH)]
    return Comparison.joined(parts)


def _both(
    ours: MegatronForward, theirs: PreTrainedModel, tokens_BS: Tensor, *, choices: bool
) -> Comparison:
    our_logits, our_choices = ours.logits_and_choices(tokens_BS)
    their_logits, their_choices = hf_logits_and_choices(theirs, tokens_BS)
    none: list[LayerChoices] = []
    if not choices:
        our_choices = their_choices = none
    return compare(our_logits, their_logits, our_choices, their_choices)
