"""Reading Megatron-LM's routing trace: lines as its RouterTracer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing as npt
import pytest

from mone_megatron.lab.routing.megatron import (
    convert_megatron,
    converted,
    is_megatron_trace,
)
from mone_megatron.lab.routing.statistics import measure
from mone_megatron.lab.routing.trace import Trace


def line(
    step: int, layer: int, top_indices: list[list[int]], *, rank: int = 0, block: str = "decoder"
) -> dict[str, Any]:
    record = {
        "step": step,
        "stage": "pre_dispatch",
        "block": block,
        "layer": layer,
        "rank": rank,
        "num_tokens": len(top_indices),
        "topk": len(top_indices[0]),
    }
    if block == "mtp":
        record["mtp_idx"] = 0
    return record | {"top_indices": top_indices}


def write(folder: Path, lines: list[dict[str, Any]], rank: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / f"router_trace_rank{rank}.jsonl").write_text(text)
    return folder


# Two microbatches of one step: layers fire in turn, twice.
LINES = [
    line(0, 1, [[0, 3], [1, 3]]),
    line(0, 2, [[2, 3], [0, 1]]),
    line(0, 1, [[0, 1]]),
    line(0, 2, [[0, 1]]),
    line(1, 1, [[2, 3]]),
    line(1, 2, [[2, 3]]),
    line(1, 0, [[0, 1]], block="mtp"),
]


def convert(folder: Path, tmp_path: Path, experts: int | None = None) -> tuple[Trace, list[str]]:
    said: list[str] = []
    trace = convert_megatron(folder, tmp_path / "trace", experts=experts, say=said.append)
    return trace, said


def test_steps_ranks_and_microbatches_are_joined(tmp_path: Path) -> None:
    folder = write(tmp_path / "megatron", LINES)
    write(folder, [line(0, 1, [[1, 3]], rank=1), line(0, 2, [[1, 2]], rank=1)], rank=1)
    assert is_megatron_trace(folder)
    trace, said = convert(folder, tmp_path)
    assert [(s.layer, s.experts, s.top_k, s.neurons) for s in trace.header.layers] == [
        (2, 4, 2, 0), (3, 4, 2, 0),
    ]  # fmt: skip
    parts = [routing.experts_NK for routing in trace.routings(2)]
    npt.assert_array_equal(np.concatenate(parts), [[0, 3], [1, 3], [0, 1], [2, 3], [1, 3]])
    assert any("left out 1 records of blocks other than the decoder" in text for text in said)
    assert any("taken for 4 experts" in text for text in said)
    (first, _) = measure(trace).layers
    npt.assert_array_equal(first.experts.tokens_E, [2, 3, 1, 4])
    npt.assert_array_equal(first.experts.together_EE[3], [1, 2, 1, 4])
    # Neighbours and token ids are not known.
    assert np.isnan(first.experts.adjacent)
    assert first.experts.token_VE.shape == (0, 4)
    assert np.isnan(first.experts.weight_E).all()


def test_the_number_of_experts_can_be_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "megatron", LINES)
    trace, said = convert(folder, tmp_path, experts=16)
    assert trace.header.layers[0].experts == 16
    assert not any("taken for" in text for text in said)
    with pytest.raises(ValueError, match=r"--num-experts: 3, but .* names expert 3"):
        convert_megatron(folder, tmp_path / "again", experts=3, say=said.append)


def test_a_converted_trace_is_used_again(tmp_path: Path) -> None:
    folder, into = write(tmp_path / "megatron", LINES), tmp_path / "trace"
    said: list[str] = []
    first = converted(folder, into, experts=4, say=said.append)
    again = converted(folder, into, experts=None, say=said.append)
    assert said[-1] == f"megatron: uses the trace in {into}"
    assert again.header == first.header
    with pytest.raises(ValueError, match="with 4 experts; give another --trace"):
        converted(folder, into, experts=5, say=said.append)
    write(folder, LINES[:4])
    with pytest.raises(ValueError, match="the trace of another model"):
        converted(folder, into, experts=4, say=said.append)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES[:3]], "step 0 does not hold all layers of all its tokens"),
        ([*LINES[:4], LINES[4]], "step 1 does not hold all layers"),
        ([{"step": 0}], "jsonl:1: is not a record of a routing trace"),
        ([LINES[0] | {"num_tokens": 3}], "jsonl:1: its top_indices are not 3 rows of 2"),
        ([LINES[0] | {"top_indices": [[0, -1], [0, 1]]}], "names expert -1"),
        ([], "holds no tokens of decoder layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    lines: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "megatron", lines), tmp_path)


def test_a_line_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "megatron", LINES)
    file = folder / "router_trace_rank0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="jsonl:7: is damaged or cut off"):
        convert(folder, tmp_path)


def test_two_of_them_are_not_held_against_each_other(tmp_path: Path) -> None:
    """They do not say what their tokens are."""
    one = write(tmp_path / "one", LINES)
    two = write(tmp_path / "two", LINES[::-1][1:][::-1])
    first = convert_megatron(one, tmp_path / "a", experts=4, say=lambda text: None)
    second = convert_megatron(two, tmp_path / "b", experts=4, say=lambda text: None)
    with pytest.raises(ValueError, match="on another text"):
        measure(first, second)
