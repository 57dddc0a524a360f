"""What models read while they are recorded: every token once, in windows, by domain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.testing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mone_megatron.data.documents import InputSettings
from mone_megatron.evaluation.corpora import Reader
from mone_megatron.lab.routing.texts import MAX_DOMAINS, Text, batches_of


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    window=st.integers(1, 9),
    max_tokens=st.integers(1, 50),
    batch_size=st.integers(1, 4),
)
def test_each_token_is_read_once(
    lengths: list[int], window: int, max_tokens: int, batch_size: int
) -> None:
    streams = [100 * number + np.arange(length) for number, length in enumerate(lengths)]
    domains = [
        [ids[start : start + window + 1] for start in range(0, len(ids) - 1, window)]
        for ids in streams
    ]
    batches = list(batches_of(domains, max_tokens=max_tokens, batch_size=batch_size))
    for number, ids in enumerate(streams):
        own = [batch.ids_BS for batch in batches if batch.domain == number]
        assert all(one.shape[0] <= batch_size and one.shape[1] <= window for one in own)
        read = np.concatenate([one.reshape(-1) for one in own])
        # The last token only follows.
        npt.assert_array_equal(read, ids[:-1][:max_tokens])


def test_documents_are_sorted_into_domains(tokenizer: Path, tmp_path: Path) -> None:
    rows = [("one two", "b"), ("", "empty"), ("three", "a"), ("four", "b")]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({"text": t, "kind": k}) + "\n" for t, k in rows))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    reader = Reader(loaded, 320, 100)
    domains = Text([str(file)], InputSettings(), "kind").domains(reader, 1000)
    assert list(domains) == ["a", "b"]
    end = reader.end_of_text
    for name, texts in (("a", ["three"]), ("b", ["one two", "four"])):
        (window,) = domains[name]
        wanted = [end]
        for text in texts:
            wanted += [*loaded.encode(text, add_special_tokens=False), end]
        npt.assert_array_equal(window, wanted)


def test_too_many_domains_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    rows = [{"text": "a", "id": str(number)} for number in range(MAX_DOMAINS + 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Reader(AutoTokenizer.from_pretrained(tokenizer), 320, 100)
    with pytest.raises(ValueError, match="'id' has more than 64 values"):
        Text([str(file)], InputSettings(), "id").domains(reader, 1000)


def test_fields_are_of_files_only(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is not a file of JSON lines or Parquet"):
        Text([str(tmp_path)], InputSettings(), "kind").check()
