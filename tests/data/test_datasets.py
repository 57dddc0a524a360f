from __future__ import annotations

import collections
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mone_megatron.config.schema import Config
from mone_megatron.data.datasets import build_datasets
from mone_megatron.data.indexed import bin_path, read_index
from mone_megatron.data.loader import SampleDataset
from mone_megatron.data.prepare import PreparedData, prepare_data

MakeCorpus = Callable[..., Path]
MakeConfig = Callable[..., Config]
SEQ = 16


def build(
    config: Config, train: int = 64, valid: int = 8, prepared: PreparedData | None = None
) -> tuple[SampleDataset, SampleDataset | None]:
    prepared = prepared or prepare_data(config)
    datasets = build_datasets(
        config, prepared, num_train_samples=train, num_valid_samples=valid, build_here=True
    )
    assert datasets[0] is not None
    return datasets[0], datasets[1]


def tokens_of(dataset: SampleDataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[index]["tokens"] for index in range(count)])


def test_samples(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    train, valid = build(make_config(prefix))
    assert valid is not None
    assert len(train) >= 64
    assert len(valid) >= 8
    sample = train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert all(value.shape == (SEQ,) for value in sample.values())
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    stream = np.fromfile(bin_path(prefix), dtype=np.uint16)
    for index in range(len(train)):
        tokens, labels = train[index]["tokens"], train[index]["labels"]
        assert torch.equal(labels[:-1], tokens[1:])
        # Every label counts, the end of documents included.
        assert train[index]["loss_mask"].eq(1).all()
        assert train[index]["position_ids"].tolist() == list(range(SEQ))
    assert int(tokens_of(train, 64).max()) <= int(stream.max())


def test_splits_share_no_document(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    index = read_index(prefix)
    train, valid = build(make_config(prefix, split=(0.6, 0.2, 0.2)))
    assert valid is not None
    count = index.documents
    train_documents = set(train.indices.tolist())  # type: ignore[attr-defined]
    valid_documents = set(valid.indices.tolist())  # type: ignore[attr-defined]
    assert train_documents == set(range(round(0.6 * count)))
    assert valid_documents == set(range(round(0.6 * count), round(0.8 * count)))


def test_splits_without_a_reader_are_not_built(
    make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    config = make_config(make_corpus(), split=(0.6, 0.2, 0.2))
    build(config, valid=0)
    names = [path.name for path in Path(config.data.cache_dir).glob("indices/*/*shuffle_index.npy")]
    assert len(names) == 1
    assert "-train-" in names[0]


def test_the_seed_decides_the_order(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    config = make_config(prefix)
    first = tokens_of(build(config)[0], 64)
    # Once from the cache, once built anew elsewhere.
    assert torch.equal(tokens_of(build(config)[0], 64), first)
    fresh = replace(config, data=replace(config.data, cache_dir=config.data.cache_dir + "2"))
    assert torch.equal(tokens_of(build(fresh)[0], 64), first)
    other = replace(config, train=replace(config.train, seed=8))
    assert not torch.equal(tokens_of(build(other)[0], 64), first)


def test_corpus_repeats_when_more_is_asked(
    make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    prefix = make_corpus(documents=20)
    once = read_index(prefix).tokens // SEQ
    train, valid = build(make_config(prefix), train=5 * once, valid=0)
    assert len(train) >= 5 * once
    assert valid is None


@pytest.mark.parametrize("weights", [(3.0, 1.0), ()])
def test_blend_follows_the_weights(
    make_corpus: MakeCorpus, make_config: MakeConfig, weights: tuple[float, ...]
) -> None:
    config = make_config(make_corpus("a"), make_corpus("b", 30, seed=1), weights=weights)
    prepared = prepare_data(config)
    assert prepared.weights is not None
    # More than one epoch of both.
    train, valid = build(config, train=2000, valid=40)
    assert valid is not None
    for dataset, count in ((train, 2000), (valid, 40)):
        assert len(dataset) >= count
        sources = collections.Counter(int(dataset[index]["dataset_id"]) for index in range(count))
        assert sources[0] / count == pytest.approx(prepared.weights[0], abs=1.5 / count)


def test_rebuilt_corpus_does_not_reuse_the_cache(
    make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    config = make_config(make_corpus(documents=80, seed=0))
    before = tokens_of(build(config)[0], 64)
    make_corpus(documents=60, seed=9)
    after = tokens_of(build(config)[0], 64)
    fresh = replace(config, data=replace(config.data, cache_dir=config.data.cache_dir + "2"))
    assert torch.equal(after, tokens_of(build(fresh)[0], 64))
    assert not torch.equal(after, before)


def test_unfinished_cache_is_built_again(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    config = make_config(make_corpus())
    before = tokens_of(build(config)[0], 64)
    (marker,) = Path(config.data.cache_dir).glob("indices/*/complete")
    marker.unlink()
    # A build killed while it wrote: the library alone would load this file.
    (index,) = marker.parent.glob("*-train-shuffle_index.npy")
    index.write_bytes(index.read_bytes()[:200])
    assert torch.equal(tokens_of(build(config)[0], 64), before)
    assert marker.exists()


def test_refuses_counts(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="num_train_samples"):
        build(make_config(make_corpus()), train=0)


def _distributed(rank: int, config: Config, prepared: PreparedData, results: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=3
    )
    train, valid = build_datasets(
        config, prepared, num_train_samples=64, num_valid_samples=8, build_here=rank < 2
    )
    if rank < 2:
        assert train is not None
        assert valid is not None
        torch.save((tokens_of(train, 64), tokens_of(valid, 8)), f"{results}/{rank}.pt")
    else:
        assert train is None
        assert valid is None
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("blend", [False, True])
def test_under_torch_distributed(
    tmp_path: Path, make_corpus: MakeCorpus, make_config: MakeConfig, blend: bool
) -> None:
    prefixes = [make_corpus("a")] + ([make_corpus("b", 30, seed=1)] if blend else [])
    config = make_config(*prefixes)
    prepared = prepare_data(config)
    context = multiprocessing.get_context("fork")
    arguments = (config, prepared, str(tmp_path))
    processes = [context.Process(target=_distributed, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    alone = replace(config, data=replace(config.data, cache_dir=config.data.cache_dir + "2"))
    train, valid = build(alone)
    assert valid is not None
    for rank in range(2):
        ranks_train, ranks_valid = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(ranks_train, tokens_of(train, 64))
        assert torch.equal(ranks_valid, tokens_of(valid, 8))
