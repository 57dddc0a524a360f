"""Manifests and the facts in them."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.checkpoint import CheckpointStore, FileDigest, check_facts
from mone_megatron.checkpoint.manifest import Manifest, decode_manifest, encode_manifest

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.text(string.ascii_letters + "._", min_size=1, max_size=6).filter(
    lambda name: name not in (".", "..")
)
digests = st.builds(
    FileDigest,
    size=st.integers(0, 2**60),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
)


def manifest_of(facts: Any, files: dict[str, FileDigest]) -> Manifest:
    return Manifest(format=1, step=3, serial=2, saved_at="2026-01-01", facts=facts, files=files)


@given(
    facts=st.dictionaries(st.text(max_size=5), plain, max_size=3),
    files=st.dictionaries(names, digests, max_size=4),
)
def test_round_trip(facts: dict[str, Any], files: dict[str, FileDigest]) -> None:
    manifest = manifest_of(check_facts(facts, environment={}), files)
    assert decode_manifest(encode_manifest(manifest)) == manifest


@given(st.binary(max_size=200))
def test_garbage_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_manifest(text)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"loss": math.nan}, r"facts\.loss is nan"),
        ({"a": [1, {"b": math.inf}]}, r"facts\.a\[1\]\.b is inf"),
        ({"path": Path("x")}, r"facts\.path is of type \w*Path"),
        ({"a": {1: 2}}, "key 1; keys must be strings"),
    ],
)
def test_facts_that_json_cannot_hold(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_facts(facts, environment={})


def test_secrets_of_the_environment_are_refused_by_name_only() -> None:
    environment = {"WANDB_API_KEY": "0123456789abcdef", "TOKENIZER_PATH": "corpora/books"}
    check_facts({"tokenizer": "corpora/books", "key": "another"}, environment=environment)
    for facts in (
        {"config": {"url": "https://x:0123456789abcdef@y"}},
        {"list": ["0123456789abcdef"]},
        {"0123456789abcdef": 1},
    ):
        with pytest.raises(ValueError, match="WANDB_API_KEY") as caught:
            check_facts(facts, environment=environment)
        assert "0123456789abcdef" not in str(caught.value)


def test_a_save_with_a_secret_is_not_made(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    partial = store.begin(1)
    (partial / "common.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="HF_TOKEN"):
        store.commit(partial, {"argv": ["--token=hf_abcdefghijkl"]})
    assert list(store.folder.iterdir()) == []
