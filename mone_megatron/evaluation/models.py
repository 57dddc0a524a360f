"""Tells what can be known of a model before its weights are read, and loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import mone_megatron.hf  # noqa: F401  # registers our exports with transformers
from mone_megatron.data.framing import Framing
from mone_megatron.hf.loading import LoadedModel, load_model
from mone_megatron.hf.source import is_ours, open_source
from mone_megatron.hf.text_format import follow, framing_of_folder

# Evaluated in float32 where that costs no more than any other: on CPUs.
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelFacts:
    """Describes a model that is there, its weights unread.

    Attributes:
        where: as the user gave it.
        tokenizer_dir: folder or name on the Hub of its tokenizer.
        tokenizer: its tokenizer, which begins texts as in the model's training.
        vocab_size: token ids that it knows.
        max_length: the longest sequence it is made for, in tokens.
        step: how far it was trained, of a checkpoint of ours; None otherwise.
        framing: the special tokens around the documents that it was trained on.
    """

    where: str
    tokenizer_dir: Path
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    max_length: int
    step: int | None
    framing: Framing

    @property
    def beginning(self) -> str:
        """Returns in words how texts begin for it."""
        return self.framing.describe(self.tokenizer.backend_tokenizer)


def look_at(where: str, *, trust_remote_code: bool = False) -> ModelFacts:
    """Returns what is known of a model without its weights.

    Args:
        where: a run or checkpoint of ours, an export or any folder in the format of transformers,
            or a model's name on the Hub.
        trust_remote_code: whether the model may bring code of its own.

    Raises:
        ValueError: there is none, it is damaged, or it has no tokenizer: one line.
    """
    path = Path(where)
    if is_ours(path):
        source = open_source(path, say=lambda message: None)
        tokenizer = _tokenizer(where, str(source.tokenizer_dir), trust_remote_code)
        length = source.config.train.seq_length
        step, framing = source.checkpoint.step, source.framing
        folder = source.tokenizer_dir
        facts = ModelFacts(where, folder, tokenizer, source.vocab_size, length, step, framing)
    else:
        if path.exists() and not (path / "config.json").is_file():
            raise ValueError(
                f"{where}: holds neither checkpoints nor config.json; give a run, an export or a "
                "model in the format of transformers"
            )
        try:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, StrictDataclassError) as error:
            raise ValueError(
                f"{where}: neither a folder with a model nor one that the Hub gives "
                f"({_line(error)})"
            ) from error
        text = config.get_text_config()
        tokenizer = _tokenizer(where, where, trust_remote_code)
        length = text.max_position_embeddings
        framing = framing_of_folder(path, tokenizer.backend_tokenizer, tokenizer.eos_token_id)
        facts = ModelFacts(where, path, tokenizer, text.vocab_size, length, None, framing)
    largest = max(facts.tokenizer.get_vocab().values())
    if largest >= facts.vocab_size:
        raise ValueError(
            f"{where}: its tokenizer has token {largest} and the model knows {facts.vocab_size}; "
            "give the tokenizer that belongs to it"
        )
    follow(facts.tokenizer, facts.framing)
    return facts


def load(
    facts: ModelFacts, *, dtype: torch.dtype | None, device: str, trust_remote_code: bool = False
) -> LoadedModel:
    """Loads the model with its weights.

    Args:
        facts: from :func:`look_at`.
        dtype: None for the model's own.
        device: as torch names it.
        trust_remote_code: as in :func:`look_at`.

    Raises:
        ValueError: the weights are missing or damaged.
    """
    try:
        return load_model(
            facts.where, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    except SafetensorError as error:
        raise ValueError(
            f"{facts.where}: its weights are truncated or damaged ({_line(error)}); get them anew"
        ) from error


def choose_device(name: str) -> str:
    """Returns the device that a name means; ``auto`` takes CUDA when there is a GPU.

    Raises:
        ValueError: torch does not know the device or sees none such.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is no device; use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} was asked for, but torch sees no GPU; use cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        # A GPU that is not there, a device without values (meta), one of another build of torch.
        raise ValueError(f"--device: torch cannot compute on {name}; use cpu or cuda") from None
    return name


def choose_dtype(name: str, device: str) -> torch.dtype | None:
    """Returns the dtype that a name means; None is the model's own.

    ``auto`` is float32 on a CPU and the model's own elsewhere.
    """
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if name == "auto" and on_cpu else DTYPES[name]


def _tokenizer(where: str, folder: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    if Path(where).exists() and not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{where}: has no tokenizer (no tokenizer.json in {folder})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{where}: its tokenizer cannot be loaded ({_line(error)})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{where}: its tokenizer is not one of the tokenizers package")
    return tokenizer


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
