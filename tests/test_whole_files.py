"""Files are there whole or not at all, and JSON is what every reader accepts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from mone_megatron.whole_files import json_text, write_json, write_whole


def test_makes_folders_and_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "folder" / "a.txt", "one", durable=True)
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_keeps_bytes_of_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert write_whole(tmp_path / "a", name).read_bytes() == b"caf\xe9"


def test_a_failure_keeps_the_old_file_and_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "a.json"
    (folder / "held").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.json"):
        write_json(folder, {"a": 1})
    assert os.listdir(tmp_path) == ["a.json"]

    path = write_json(tmp_path / "b.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": np.float64("nan"), "d": True}
    text = json_text(value)
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, {"b": None}]], "c": None, "d": True,
    }  # fmt: skip


def test_writes_a_line_and_other_kinds_by_what_stands_for_them() -> None:
    assert json_text({"a": [1, None]}, indent=None) == '{"a": [1, null]}\n'
    assert json.loads(json_text({"a": Path("b")}, default=str)) == {"a": "b"}
