"""Records routing traces of models on texts: ``tools/analyze_run.py``, where there are models.

:mod:`mone_megatron.lab.routing` is the rest, which needs no transformers to read a trace.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mone_megatron.checkpoint import read_checkpoint
from mone_megatron.evaluation.corpora import Reader
from mone_megatron.evaluation.models import ModelFacts, load, look_at
from mone_megatron.lab.routing.record import Batch, record
from mone_megatron.lab.routing.subjects import Subject
from mone_megatron.lab.routing.texts import Text, batches_of
from mone_megatron.lab.routing.trace import (
    HEADER_FILE,
    TextDigest,
    Trace,
    TraceHeader,
    TraceWriter,
)
from mone_megatron.report.files import files_identity

DEFAULT_KEEP_RATIO = 0.25
_SCORE = "abs_activation"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Holds how traces are recorded.

    Attributes:
        seq_length: tokens of a window; None for what the models are made for, up to 2048.
        max_tokens: tokens to read of each domain.
        batch_size: windows in one forward pass, and in a shard.
        keep_ratio: share of neurons looked at in models without selection; None for a quarter.
        score: what ranks them; None for |a|.
        dtype, device, trust_remote_code: as :func:`mone_megatron.evaluation.models.load`.
    """

    seq_length: int | None
    max_tokens: int
    batch_size: int
    keep_ratio: float | None
    score: str | None
    dtype: torch.dtype | None
    device: str
    trust_remote_code: bool


class Recorder:
    """Makes the trace of a model, or takes one that was made before."""

    def __init__(self, text: Text, settings: Settings, say: Say) -> None:
        """Checks that the text is there.

        Raises:
            ValueError: naming what is not.
        """
        if not text.places:
            raise ValueError("--text: give what the models are to read")
        text.check()
        self.text, self.settings, self.say = text, settings, say

    def __call__(self, subject: Subject, folder: Path) -> Trace:
        """Returns the trace of ``subject`` in ``folder``, recorded unless it is there already.

        Raises:
            ValueError: the model or the text cannot be read, the model has no routed experts, or
                the folder holds another trace: one line.
        """
        settings, where = self.settings, subject.where
        facts = look_at(where, trust_remote_code=settings.trust_remote_code)
        identity = _identity(where)
        found = Trace(folder) if (folder / HEADER_FILE).is_file() else None
        if found is not None and found.header.identity != identity:
            raise ValueError(
                f"{folder}: holds the trace of another model ({found.header.name}); give another "
                "--trace"
            )
        length = settings.seq_length or min(facts.max_length, 2048)
        reader = Reader(facts.tokenizer, facts.vocab_size, length, facts.framing)
        self.say(f"{subject.label}: {facts.beginning}")
        domains = self.text.domains(reader, settings.max_tokens, self.say)
        batches = list(
            batches_of(
                list(domains.values()),
                max_tokens=settings.max_tokens,
                batch_size=settings.batch_size,
            )
        )
        if not batches:
            raise ValueError(f"--text: {', '.join(self.text.places)}: hold no text")
        if found is None:
            return self._record(subject, facts, tuple(domains), batches, folder, identity)
        same_text = found.text_sha256 == _digest(batches, identity)
        if not same_text or found.header.domains != tuple(domains):
            raise ValueError(
                f"{folder}: holds a trace of this model on another text, in other windows or "
                "domains; give another --trace"
            )
        chosen = found.header.selection
        if chosen is not None and chosen.by == "analysis":
            wanted = (settings.keep_ratio or DEFAULT_KEEP_RATIO, settings.score or _SCORE)
            if (chosen.keep_ratio, chosen.score) != wanted:
                raise ValueError(
                    f"{folder}: holds a trace with --keep-ratio {chosen.keep_ratio:g} --score "
                    f"{chosen.score}; give these, or another --trace"
                )
        self.say(f"{subject.label}: uses the trace in {folder}")
        return found

    def _record(
        self,
        subject: Subject,
        facts: ModelFacts,
        domains: tuple[str, ...],
        batches: Sequence[Batch],
        folder: Path,
        identity: str,
    ) -> Trace:
        settings, say = self.settings, self.say
        loaded = load(
            facts,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        )
        writer = TraceWriter(folder)
        total = sum(batch.ids_BS.size for batch in batches)
        with tqdm(
            total=total, desc=f"recording {subject.label}", unit="tok", unit_scale=True
        ) as bar:
            recorded = record(
                loaded.model,
                batches,
                writer,
                keep_ratio=settings.keep_ratio or DEFAULT_KEEP_RATIO,
                score=settings.score or _SCORE,
                progress=bar.update,
                name=subject.label,
            )
        del loaded
        gc.collect()
        selection = recorded.selection
        if selection is None:
            say(f"{subject.label}: its experts have no gate; neurons are left out")
        elif selection.by == "model" and (settings.keep_ratio or settings.score):
            say(
                f"{subject.label}: selects neurons itself (keep ratio {selection.keep_ratio:g}, "
                f"{selection.score}); --keep-ratio and --score are not for it"
            )
        seen = np.unique(np.concatenate([batch.ids_BS.reshape(-1) for batch in batches]))
        return writer.close(
            TraceHeader(
                name=subject.label,
                step=facts.step,
                identity=identity,
                layers=recorded.layers,
                domains=domains,
                selection=selection,
                texts={int(token): str(facts.tokenizer.decode([int(token)])) for token in seen},
                beginning=facts.beginning,
            )
        )


def _digest(batches: Sequence[Batch], identity: str) -> str:
    """Returns the digest of the text that a trace of these batches would have."""
    digest = TextDigest()
    windows = 0
    for batch in batches:
        digest.add(batch.tokens(windows))
        windows += len(batch.ids_BS)
    return digest.hexdigest(identity)


def _identity(where: str) -> str:
    """Returns a hash that is equal for the same weights.

    It is of a checkpoint's manifest, of a folder's files, or of a model's name.
    """
    folder = Path(where)
    if (folder / "manifest.json").is_file():
        return read_checkpoint(folder).manifest_sha256
    if folder.is_dir():
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        return files_identity(sorted([folder / "config.json", *weights]))
    return hashlib.sha256(where.encode()).hexdigest()
