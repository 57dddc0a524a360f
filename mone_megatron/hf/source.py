"""Opens a run or a checkpoint of ours, verified, on one machine, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_megatron.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from mone_megatron.checkpoint.tensors import TensorInfo, TensorReader
from mone_megatron.config.load import from_yaml
from mone_megatron.config.prediction import MTPConfig
from mone_megatron.config.schema import Config, ModelConfig, MoNEConfig
from mone_megatron.data.framing import Framing, framing_of, template_opening
from mone_megatron.data.tokenizer import (
    LoadedTokenizer,
    end_of_document,
    load_tokenizer,
    special_token,
)
from mone_megatron.hf.architectures import BY_TYPE, Architecture, choose
from mone_megatron.hf.dtypes import main_dtype, written_dtype
from mone_megatron.hf.origin import TOKEN_IDS, Origin

OPTIMIZER = "optimizer."
MASTER = "optimizer.master."
# Of the layers of multi-token prediction.
_PREDICTION = "mtp."


@dataclass(frozen=True)
class Source:
    """Describes a checkpoint that is to be exported, evaluated or continued.

    Layers of multi-token prediction are no part of it: they help to train the others.
    """

    checkpoint: Checkpoint
    reader: TensorReader
    config: Config
    vocab_size: int

    @property
    def model(self) -> ModelConfig:
        """Returns the settings of the model."""
        return self.config.model

    @property
    def mone(self) -> MoNEConfig:
        """Returns the settings of neuron selection as they were at the checkpoint's step."""
        mone = self.config.mone
        return replace(mone, keep_ratio=mone.keep_ratio_at(self.checkpoint.step))

    @property
    def architecture(self) -> Architecture:
        """Returns what it is exported as.

        That is what it was imported as while that holds it, else what
        :func:`~mone_megatron.hf.architectures.choose` says.
        """
        mone = self.mone.enabled
        if self.origin is not None:
            own = BY_TYPE[self.origin.model_type]
            if not own.lacks(self.model, mone=mone):
                return own
        return choose(self.model, mone=mone)

    @property
    def tokenizer_dir(self) -> Path:
        """Returns the folder of the tokenizer it was trained with, which need not be there."""
        return self.checkpoint.path / "tokenizer"

    @property
    def framing(self) -> Framing:
        """Returns the special tokens around the documents that it was trained on.

        Raises:
            ValueError: what the checkpoint says of them is damaged.
        """
        facts = self.checkpoint.facts.get("framing")
        where = f"checkpoint {self.checkpoint.path}"
        if facts is not None:
            return framing_of(facts, eod=None, where=where)
        # An old checkpoint: its tokenizer names what ended documents.
        try:
            tokenizer = load_tokenizer(self.tokenizer_dir)
        except ValueError:
            return framing_of(None, eod=None, where=where)
        eod = _named_eod(tokenizer)
        if "imported_from" in self.checkpoint.facts:
            # Another's model, which follows its tokenizer whenever it was imported.
            return Framing(template_opening(tokenizer.tokenizer), eod)
        framing = framing_of(None, eod=eod, where=where)
        return framing.known_by(tokenizer.tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """Returns the id that ends a document; None without a tokenizer or where it names none."""
        return self.framing.eod

    @property
    def origin(self) -> Origin | None:
        """Returns the model of others that its weights began as; None when there was none."""
        return Origin.from_facts(self.checkpoint.facts)

    @property
    def token_ids(self) -> dict[str, Any]:
        """Returns the special tokens of a configuration: ``bos_token_id`` and the like.

        While the tokenizer is the imported model's, they are that model's, but for those that stood
        around the documents of the training. Otherwise they are those, and the ``pad_token`` that
        the tokenizer's settings name; where they name none, what ends a document pads.
        """
        begin, end = (self.framing.opening or (None,))[-1], self.framing.eod
        if self.origin is not None and self.origin.has_tokenizer(self.tokenizer_dir):
            config = self.origin.standard_config()
            ids = {name: getattr(config, name) for name in TOKEN_IDS}
            ends = ids["eos_token_id"]
            if end is not None and end not in (ends if isinstance(ends, list) else [ends]):
                ids["eos_token_id"] = end
            if begin is not None:
                ids["bos_token_id"] = begin
            return ids
        pad = None
        if (self.tokenizer_dir / "tokenizer.json").is_file():
            name = special_token(self.tokenizer_dir, "pad_token")
            if name is not None:
                pad = load_tokenizer(self.tokenizer_dir).tokenizer.token_to_id(name)
        return {
            "bos_token_id": begin,
            "eos_token_id": end,
            "pad_token_id": end if pad is None else pad,
        }

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """Returns shape and dtype of the model's tensors by name, without the optimizer's."""
        return {
            name: info
            for name, info in self.reader.tensors.items()
            if not name.startswith((OPTIMIZER, _PREDICTION))
        }

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of most elements of the weights."""
        return main_dtype(
            (info.dtype, torch.Size(info.shape).numel()) for info in self.weights.values()
        )

    def read(self, name: str, row: int | None = None, *, dtype: torch.dtype | None) -> Tensor:
        """Reads a weight as it is exported: in the best precision that ``dtype`` can use.

        Args:
            name: of the weight.
            row: of its first axis; None for all of it.
            dtype: what to convert to (fp32 takes the master where there is one); None for its own.

        Returns:
            The tensor, on the CPU. A bias that chooses experts, or a selection rule's state, is
            fp32 whatever ``dtype`` is.
        """
        master = MASTER + name
        exact = dtype is torch.float32 and master in self.reader.tensors
        stored = self.reader.read(master if exact else name, row)
        return stored.to(written_dtype(name, stored.dtype, dtype))


def _named_eod(tokenizer: LoadedTokenizer) -> int | None:
    try:
        return end_of_document(tokenizer)
    except ValueError:
        return None


def is_ours(where: Path) -> bool:
    """Returns whether a folder is a run or a checkpoint of ours, not a Hugging Face model."""
    return (where / "manifest.json").is_file() or (where / "checkpoints").is_dir()


def open_source(where: Path, *, say: Callable[[str], None]) -> Source:
    """Opens a run's newest checkpoint that verifies, or the checkpoint ``where``.

    Args:
        where: a run's folder (``run.dir``), its ``checkpoints``, or one checkpoint.
        say: is told what was chosen, skipped or left out.

    Raises:
        ValueError: no checkpoint there, a damaged one (naming the files), or one that lacks what
            describes it.
    """
    if not where.is_dir():
        raise ValueError(f"{where}: there is no such folder; give a run, a checkpoint or an export")
    if (where / "manifest.json").is_file():
        checkpoint: Checkpoint | None = open_checkpoint(where)
    else:
        folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
        checkpoint = CheckpointStore(folder, log=say).newest_verified()
    if checkpoint is None:
        raise ValueError(
            f"{where}: no checkpoint there; save some with checkpoint.interval, or give one"
        )
    for name in ("config.yaml", ".metadata"):
        if not (checkpoint.path / name).is_file():
            raise ValueError(f"checkpoint {checkpoint.path} holds no {name}")
    identity = checkpoint.facts.get("identity", {})
    if not isinstance(identity.get("vocab_size"), int):
        raise ValueError(f"checkpoint {checkpoint.path}: its manifest names no vocab_size")
    config = from_yaml(checkpoint.path / "config.yaml")
    if depth := config.model.mtp.depth:
        say(
            f"checkpoint {checkpoint.path}: the layers that predict later tokens "
            f"(model.mtp.depth={depth}) are left out; the next token needs none of them"
        )
        config = replace(config, model=replace(config.model, mtp=MTPConfig()))
    return Source(checkpoint, TensorReader(checkpoint), config, identity["vocab_size"])
