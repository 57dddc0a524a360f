"""Files are there whole or not at all, and JSON is what every reader accepts."""

from __future__ import annotations

import json
import math
import os
import stat
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


def test_a_pipe_is_written_into_and_stays(tmp_path: Path) -> None:
    """So does a device: as root a file took the place of /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert write_json(pipe, {"a": 1}, indent=0) == pipe
        assert json.loads(os.read(reader, 100)) == {"a": 1}
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_a_file_that_others_have_open_as_their_output_is_written_into(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    with path.open("w") as stream:
        inode = path.stat().st_ino
        write_whole(Path(f"/proc/self/fd/{stream.fileno()}"), "a line\n")
    assert path.read_text() == "a line\n"
    assert path.stat().st_ino == inode


def test_what_a_link_names_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    target, link = tmp_path / "kept" / "a.txt", tmp_path / "a.txt"
    link.symlink_to(target)
    for text in ("new", "again"):
        write_whole(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["a.txt"]


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
