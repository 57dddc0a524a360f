"""Whatever sources, weights and counts: a blend is the mixture asked for, or is refused by key."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mone_megatron.config import validate
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from mone_megatron.data.datasets import build_datasets
from mone_megatron.data.indexed import IndexedWriter, bin_path, idx_path
from mone_megatron.data.prepare import prepare_data
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer

SEQ = 16
# Lengths of the documents of each source; every token of source i is i + 1. The second holds 24
# samples and no token more; the third is one token short of a sample in the longer sequences.
SOURCES = (
    [SEQ + 1],
    [24 * SEQ + 1],
    [2 * SEQ],
    [5] * 4,
    [80],
    [3, 90, 7, 41] * 30,
    [200] * 50,
    [17] * 9,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes every source, with one tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = train_tokenizer(["a b"], 257)
    for number, lengths in enumerate(SOURCES):
        prefix = folder / f"{number}"
        with IndexedWriter(bin_path(prefix), np.uint16) as writer:
            writer.add_documents(np.full(sum(lengths), number + 1, np.uint16), lengths)
            writer.write_index(idx_path(prefix))
        save_tokenizer(tokenizer, folder / f"{number}.tokenizer")
    return folder


def counts_of(
    folder: Path,
    sources: list[int],
    weights: list[float],
    split: tuple[float, float, float],
    asked: tuple[int, int],
    seq: int = SEQ,
) -> Iterator[tuple[list[float], list[int]]]:
    """Of training and of validation: each source's share, and its samples among those asked."""
    train, valid = asked
    with TemporaryDirectory() as cache:
        config = Config(
            model=ModelConfig(vocab_size=512),
            data=DataConfig(
                source="indexed",
                paths=tuple(str(folder / f"{source}") for source in sources),
                weights=tuple(weights),
                split=split,
                cache_dir=cache,
            ),
            train=TrainConfig(seq_length=seq, eval_interval=int(valid > 0)),
        )
        validate(config, world_size=1)
        prepared = prepare_data(config)
        built = build_datasets(
            config, prepared, num_train_samples=train, num_valid_samples=valid, build_here=True
        )
        shares = list(prepared.weights or [1.0])
        for dataset, number in zip(built, asked, strict=True):
            if number == 0:
                assert dataset is None
                continue
            assert dataset is not None
            # One source repeats whole, and so may be longer.
            assert len(dataset) >= number if len(sources) == 1 else len(dataset) == number
            drawn = [set(dataset[index]["tokens"].tolist()) for index in range(number)]
            assert all(len(tokens) == 1 for tokens in drawn)
            found = collections.Counter(tokens.pop() - 1 for tokens in drawn)
            assert set(found) <= set(sources)
            yield shares, [found[source] for source in sources]


def check_mixture(shares: list[float], counts: list[int]) -> None:
    """A source is never drawn a whole sample more than its share, nor late by many."""
    total = sum(counts)
    for share, count in zip(shares, counts, strict=True):
        assert count < share * total + 1 + 1e-6
        # What one is behind, the others are ahead together.
        assert count > share * total - len(shares)


TAME = st.one_of(st.sampled_from([0.01, 0.5, 0.95, 1.0]), st.floats(-12, 12).map(lambda p: 10.0**p))
WILD = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@st.composite
def blends(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    # Half of the time those only that a training split of one document fills a sequence of.
    few = st.sampled_from([0, 1, 2, 4, 5, 6, 7])
    chosen = draw(st.sampled_from([few, st.sampled_from(range(len(SOURCES)))]))
    sources = draw(st.lists(chosen, min_size=1, unique=True))
    kind = draw(st.sampled_from([st.just(0.0), TAME, TAME, WILD]))
    weights = [draw(kind) for _ in sources]
    return sources, weights if any(weights) else []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    blend=blends(),
    split=st.sampled_from([(1.0, 0.0, 0.0)] * 3 + [(0.9, 0.1, 0.0), (0.5, 0.5, 0.0)]),
    train=st.one_of(st.integers(1, 60), st.sampled_from([24, 500, 3000])),
    valid=st.sampled_from([0, 0, 1, 33]),
    seq=st.sampled_from([SEQ, SEQ, 4, 2 * SEQ]),
)
@example(
    blend=([1, 0, 2, 3, 4, 7], [0.95, *[0.01] * 5]),
    split=(1.0, 0.0, 0.0), train=24, valid=0, seq=SEQ,
)  # fmt: skip
@example(
    blend=([0, 2, 4, 7, 1], [1e-9, 1e-9, 1e-9, 1e-9, 1.0]),
    split=(1.0, 0.0, 0.0), train=24, valid=0, seq=SEQ,
)  # fmt: skip
@example(blend=([5, 6], [1e300, 1e-10]), split=(0.5, 0.5, 0.0), train=40, valid=33, seq=SEQ)
def test_any_blend_is_the_mixture_or_refused(
    folder: Path,
    blend: tuple[list[int], list[float]],
    split: tuple[float, float, float],
    train: int,
    valid: int,
    seq: int,
) -> None:
    sources, weights = blend
    try:
        for shares, counts in counts_of(folder, sources, weights, split, (train, valid), seq):
            check_mixture(shares, counts)
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith(("data.weights: ", "data.paths[", "data.split: ")), problem
            assert any(character.isdigit() for character in problem)


def test_small_sources_beside_one_that_is_just_large_enough(folder: Path) -> None:
    sources, weights = [1, 0, 2, 3, 4, 7], [0.95, *[0.01] * 5]
    ((_, counts),) = counts_of(folder, sources, weights, (1.0, 0.0, 0.0), (24, 0))
    assert counts[0] == math.ceil(0.95 * 24) - 1
    assert sum(counts) == 24


def test_a_source_of_one_sample_repeats(folder: Path) -> None:
    ((_, counts),) = counts_of(folder, [0, 6], [3.0, 1.0], (1.0, 0.0, 0.0), (400, 0))
    assert counts == [300, 100]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0, 0.0], "[1, 0] has an entry that is not above 0"),
        ([1e308, 1e308], "[1e+308, 1e+308] are too large to add up"),
        ([5e-324, 1e10], "4.94066e-324 of 1e+10 is too small a share"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(
    folder: Path, weights: list[float], told: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        list(counts_of(folder, [5, 6], weights, (1.0, 0.0, 0.0), (8, 0)))
    assert str(refused.value).startswith(f"data.weights: {told}")


def test_a_source_too_small_for_a_sequence_is_refused_by_its_key(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.paths\[1\]: .* has 17 tokens, fewer .* = 33"):
        list(counts_of(folder, [6, 0], [], (1.0, 0.0, 0.0), (8, 0), 2 * SEQ))
