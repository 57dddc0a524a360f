"""Builds training and validation datasets through megatron-core's builders.

The builders keep their shuffles (indices) in files. Those files are made under a name that digests
everything they depend on, the data's fingerprint included, and count only once a marker with their
digests is there: a rebuilt corpus, a build that was killed, or a damaged file cannot leave a stale
one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from mone_megatron.config.schema import Config
from mone_megatron.data.apart import DocumentsApart
from mone_megatron.data.files import quick_digest, sync_file
from mone_megatron.data.loader import SampleDataset
from mone_megatron.data.prepare import PreparedData
from mone_megatron.os_errors import explained
from mone_megatron.ownership import locked
from mone_megatron.whole_files import json_text, write_whole

# Written last, into a cache that is whole.
_MARKER = "complete"


def build_datasets(
    config: Config,
    prepared: PreparedData,
    *,
    num_train_samples: int,
    num_valid_samples: int,
    build_here: bool,
) -> tuple[SampleDataset | None, SampleDataset | None]:
    """Builds the datasets of a run; with torch.distributed initialised, a collective call.

    A sample is a dict of CPU tensors [seq]: ``tokens``, ``labels``, ``position_ids`` (int64) and
    ``loss_mask`` (float32). Documents are packed; the label of a position is the next token. With
    ``data.reset_attention`` it says, too, which document each token belongs to.

    Args:
        config: ``data``, and of ``train`` the seed and the sequence length.
        prepared: what :func:`mone_megatron.data.prepare.prepare_data` returned.
        num_train_samples: training samples needed; the corpus repeats if it holds fewer.
        num_valid_samples: validation samples needed; 0 for no validation.
        build_here: whether this process reads data (global rank 0 always builds, since it writes
            the index cache).

    Returns:
        The training and the validation dataset, each at least as long as asked; None where this
        process builds none or there is no validation.

    Raises:
        ValueError: ``data.cache_dir`` is not shared by all nodes, or the counts are out of range.
    """
    if num_train_samples < 1 or num_valid_samples < 0:
        raise ValueError("num_train_samples must be at least 1, num_valid_samples at least 0")
    sizes = [num_train_samples, num_valid_samples, 0]
    cache = Path(config.data.cache_dir) / "indices" / _cache_name(config, prepared, sizes)
    distributed = torch.distributed.is_initialized()
    first = not distributed or torch.distributed.get_rank() == 0
    # Only the first rank writes the cache; the lock keeps other runs out while it does.
    with locked(cache.with_suffix(".lock")) if first else nullcontext():
        if first and cache.exists() and not _is_whole(cache):
            shutil.rmtree(cache)
        builder = (_Builder if distributed else _SingleProcessBuilder)(
            GPTDataset,
            sizes,
            lambda: build_here or first,
            _dataset_config(config, prepared, str(cache), with_valid=num_valid_samples > 0),
        )
        try:
            with _quiet():
                train, valid, _ = builder.build()
        except FileNotFoundError as error:
            if first:
                raise
            raise ValueError(
                f"data.cache_dir={config.data.cache_dir}: this process does not see the index files"
                " rank 0 wrote there; use a folder that all nodes share"
            ) from error
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={config.data.cache_dir}: the index files cannot be made or read"
                f" ({explained(error)}); use a folder that has room and can be written"
            ) from error
        if first and not (cache / _MARKER).exists():
            for path in cache.iterdir():
                sync_file(path)
            write_whole(cache / _MARKER, json_text(_digests(cache), indent=None), durable=True)
    if config.data.reset_attention:
        train, valid = (
            None if samples is None else DocumentsApart(samples, prepared.eod)
            for samples in (train, valid)
        )
    return train, valid


def _digests(cache: Path) -> dict[str, str]:
    """Returns the digest of every file but the marker, by name; of large files of a sample."""
    names = sorted(path.name for path in cache.iterdir() if path.name != _MARKER)
    return {name: quick_digest(cache / name) for name in names}


def _is_whole(cache: Path) -> bool:
    """Returns whether the files are those that the marker was written for."""
    try:
        expected = json.loads((cache / _MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(expected == _digests(cache))


class _TokenizerFacts:
    """Has all that GPTDataset asks of a tokenizer; its identity is in the cache's file names."""

    def __init__(self, prepared: PreparedData) -> None:
        self.vocab_size = prepared.vocab_size
        self.eod = prepared.eod
        self.unique_identifiers = OrderedDict(
            data=prepared.fingerprint, vocab_size=prepared.vocab_size, eod=prepared.eod
        )


class _InMemoryBlendedDataset(BlendedDataset):
    """Is a BlendedDataset that keeps its (small) index in memory.

    The library asks for the rank before it writes that index to the cache, which fails unless
    torch.distributed is initialised.
    """

    config: Any

    def _build_indices(self) -> tuple[Any, Any]:
        cached_config = self.config
        self.config = copy.copy(cached_config)
        self.config.path_to_cache = None
        try:
            return super()._build_indices()
        finally:
            self.config = cached_config


class _Builder(BlendedMegatronDatasetBuilder):
    """Is the library's builder, except that a blend is as long as asked.

    The library asks each source for its share of the samples, rounded up, and makes the blend as
    long as the sum of those. Many small shares make that so much more than asked that the largest
    source is drawn from more often than it was built for. A blend draws in an order that does not
    depend on its length, so the shorter one is the beginning of the longer one, and of each source
    it takes its share, rounded up, at most.
    """

    sizes: list[int]

    def build_generic_dataset(
        self,
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        if cls is BlendedDataset and is_built_on_rank():
            sources, weights, _, settings = args
            args = (sources, weights, self.sizes[sources[0].index_split.value], settings)
        return self._build_one(cls, is_built_on_rank, synchronize_ranks, *args)

    def _build_one(
        self,
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        return super().build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


class _SingleProcessBuilder(_Builder):
    """Is the builder for a process without torch.distributed."""

    def _build_one(
        self,
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        return (_InMemoryBlendedDataset if cls is BlendedDataset else cls)(*args)


def _dataset_config(
    config: Config, prepared: PreparedData, cache: str, *, with_valid: bool
) -> GPTDatasetConfig:
    weights = None if prepared.weights is None else list(prepared.weights)
    dataset_config = GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.train.seq_length,
        blend=(list(prepared.prefixes), weights),
        split=",".join(f"{share:.12f}" for share in config.data.split),
        path_to_cache=cache,
        mmap_bin_files=True,
        tokenizer=_TokenizerFacts(prepared),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Splits without a reader are not built; their documents stay out of the others all the same.
    dataset_config.split_matrix[2] = None
    if not with_valid:
        dataset_config.split_matrix[1] = None
    return dataset_config


def _cache_name(config: Config, prepared: PreparedData, sizes: list[int]) -> str:
    facts = [
        megatron.core.__version__,
        prepared.fingerprint,
        prepared.prefixes,
        prepared.weights,
        prepared.vocab_size,
        prepared.eod,
        config.data.split,
        config.train.seed,
        config.train.seq_length,
        sizes,
    ]
    if prepared.weights is not None:
        # Blends were longer than asked once; the files of those have other names.
        facts.append("blends as long as asked")
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the builders' narration out of the terminal; errors are raised, not logged."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
