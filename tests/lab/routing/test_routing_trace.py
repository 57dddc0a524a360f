"""The trace's files: what is written is read, and nothing that is damaged is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.testing as npt
import pytest
from routing_traces import make_trace

from mone_megatron.lab.routing.bits import unpack
from mone_megatron.lab.routing.trace import (
    HEADER_FILE,
    Trace,
    TraceWriter,
    check_same_text,
)

LAYERS = {1: [[0, 1], [1, 2], [2, 0], [0, 2]], 3: [[1, 0], [2, 1], [0, 1], [2, 0]]}
KEPT = {layer: [["110000000", "000000011"]] * 4 for layer in LAYERS}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return make_trace(
        tmp_path / "trace", LAYERS, experts=3, kept=KEPT, ids=[5, 6, 5, 7], shards=2, step=20
    )


def test_what_is_written_is_read(trace: Trace) -> None:
    assert trace.header.step == 20
    assert trace.tokens == 4
    assert trace.header.texts == {5: "<5>", 6: "<6>", 7: "<7>"}
    assert [len(text) for text in trace.texts()] == [2, 2]
    npt.assert_array_equal(np.concatenate([text.ids_N for text in trace.texts()]), [5, 6, 5, 7])
    for layer, rows in LAYERS.items():
        parts = list(trace.routings(layer))
        npt.assert_array_equal(np.concatenate([part.experts_NK for part in parts]), rows)
        assert parts[0].weights_NK is not None
        npt.assert_allclose(parts[0].weights_NK, 0.5)
        assert parts[0].kept_NKB is not None
        npt.assert_array_equal(unpack(parts[0].kept_NKB, 9)[0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-00001.npz").unlink(), "shard-00001.npz: the trace is truncated"),
        (
            lambda f: (f / "shard-00001.npz").write_bytes(
                (f / "shard-00001.npz").read_bytes()[:-40]
            ),
            "truncated: it has .* bytes",
        ),
        (lambda f: (f / HEADER_FILE).unlink(), "its recording did not finish"),
        (lambda f: (f / HEADER_FILE).write_text("{"), "trace.json: is damaged"),
        (lambda f: (f / HEADER_FILE).write_text("[]"), "is not the header of a routing trace"),
        (lambda f: edit(f, version=2), "has version 2, this program reads 1"),
        (lambda f: edit(f, layers=[{"no": 1}]), "trace.json: is damaged"),
    ],
)
def test_damage_is_refused_when_a_trace_is_opened(trace: Trace, damage, message: str) -> None:  # noqa: ANN001
    damage(trace.folder)
    with pytest.raises(ValueError, match=message) as caught:
        Trace(trace.folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(document | changes))


def test_damage_inside_a_shard_is_refused_when_it_is_read(trace: Trace) -> None:
    shard = trace.folder / "shard-00001.npz"
    data = bytearray(shard.read_bytes())
    place = data.index(b"layer_3.experts")
    # In the array after its name and the header of the .npy file.
    data[place + 15 + 128 + 1] ^= 0xFF
    shard.write_bytes(data)
    opened = Trace(trace.folder)
    with pytest.raises(ValueError, match=re.escape(str(shard))):
        list(opened.routings(3))


def test_an_expert_beyond_the_layer_is_refused(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", {1: [[0, 3]]}, experts=3)
    with pytest.raises(ValueError, match="layer 1 names expert 3 of 3"):
        list(trace.routings(1))


def test_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace"):
        Trace(tmp_path)


def test_a_folder_with_something_else_is_not_written_into(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a trace already"):
        TraceWriter(trace.folder)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        TraceWriter(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_unfinished_trace_is_written_again(trace: Trace) -> None:
    (trace.folder / HEADER_FILE).unlink()
    TraceWriter(trace.folder)
    assert not list(trace.folder.iterdir())


def test_traces_of_other_texts_and_models_are_not_compared(trace: Trace, tmp_path: Path) -> None:
    same = make_trace(
        tmp_path / "same", LAYERS, experts=3, kept=KEPT, ids=[5, 6, 5, 7], name="same"
    )
    check_same_text(trace, same)
    other = make_trace(tmp_path / "other", LAYERS, experts=3, kept=KEPT, ids=[5, 6, 5, 8])
    with pytest.raises(ValueError, match="was traced on another text"):
        check_same_text(trace, other)
    larger = make_trace(tmp_path / "larger", LAYERS, experts=4, kept=KEPT, ids=[5, 6, 5, 7])
    with pytest.raises(ValueError, match="is another model than"):
        check_same_text(trace, larger)


def test_an_empty_trace_is_refused(tmp_path: Path, trace: Trace) -> None:
    with pytest.raises(ValueError, match="no tokens were traced"):
        TraceWriter(tmp_path / "empty").close(trace.header)
