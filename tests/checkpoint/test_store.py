"""The life of checkpoints in a store: saving, finding, keeping, cleaning."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_helpers import contents, holds, save, write

from mone_megatron.checkpoint import (
    CheckpointStore,
    CheckpointWriteError,
    DamagedCheckpointError,
    NoUsableCheckpointError,
    digest_files,
    open_checkpoint,
    read_checkpoint,
    write_error,
)
from mone_megatron.checkpoint import digests as digests_module
from mone_megatron.checkpoint import durable as durable_module
from mone_megatron.checkpoint.digests import damaged_files, share_of
from mone_megatron.checkpoint.names import checkpoint_name, hidden_name, parse_hidden, step_of
from mone_megatron.checkpoint.retention import Saved, steps_to_delete


def names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.folder))


def test_a_save_is_found_and_verified(store: CheckpointStore, logged: list[str]) -> None:
    assert store.newest_verified() is None
    folder = save(store, 120)
    assert folder == store.folder / "step_00000120"
    assert names(store) == ["latest.json", "step_00000120"]
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 120)
    assert holds(store.open(folder), 120)
    assert logged == []


def test_nothing_is_visible_before_the_commit_or_after_an_abort(store: CheckpointStore) -> None:
    partial = store.begin(1)
    write(partial, contents(1))
    assert store.newest_verified() is None
    store.abort(partial)
    store.abort(partial)
    assert names(store) == []


def test_digests_split_over_ranks_are_those_of_one(store: CheckpointStore) -> None:
    partial = store.begin(1)
    write(partial, contents(1))
    shares = [digest_files(partial, rank=rank, world_size=3) for rank in range(3)]
    assert sum(len(share) for share in shares) == len(contents(1))
    union = {name: digest for share in shares for name, digest in share.items()}
    assert union == digest_files(partial)
    store.commit(partial, {"step": 1, "attempt": 0}, files=union)
    checkpoint = store.newest_verified()
    assert checkpoint is not None
    (checkpoint.path / "__1_0.distcp").write_bytes(b"x" * 2000)
    split = [checkpoint.damage(rank, 3) for rank in range(3)]
    assert sorted(itertools.chain(*split)) == checkpoint.damage() != []
    assert "__1_0.distcp" in str(split)


def test_digests_by_threads_are_those_of_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = store.begin(1)
    write(partial, contents(1))
    alone = digest_files(partial)
    monkeypatch.setattr(digests_module, "_BYTES_PER_THREAD", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert digest_files(partial) == alone
    assert damaged_files(partial, alone) == []
    (partial / "__0_0.distcp").write_bytes(b"x" * 2000)
    (partial / "empty").unlink()
    problems = damaged_files(partial, alone)
    assert [problem.split(":")[0] for problem in problems] == ["__0_0.distcp", "empty"]


@given(
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 1000), max_size=20),
    st.integers(1, 7),
)
def test_every_file_is_on_one_rank_and_bytes_are_even(sizes: dict[str, int], ranks: int) -> None:
    shares = [share_of(sizes, rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == sorted(sizes)
    loads = [sum(sizes[name] + 1 for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0) + 1


def test_a_commit_refuses_files_that_were_not_hashed(store: CheckpointStore) -> None:
    first = save(store, 1)
    partial = store.begin(2)
    write(partial, contents(2))
    digests = digest_files(partial)
    (partial / "late").write_bytes(b"from a slow rank")
    with pytest.raises(ValueError, match="late was not hashed"):
        store.commit(partial, {}, files=digests)
    assert names(store) == ["latest.json", first.name]

    partial = store.begin(2)
    write(partial, contents(2))
    digests = digest_files(partial)
    (partial / "common.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"common\.pt changed"):
        store.commit(partial, {}, files=digests)

    with pytest.raises(ValueError, match="no files"):
        store.commit(store.begin(2), {})
    with pytest.raises(ValueError, match="not a partial checkpoint"):
        store.commit(first, {})
    with pytest.raises(ValueError, match="not a partial checkpoint"):
        store.abort(first)
    assert names(store) == ["latest.json", first.name]


def test_a_link_in_a_save_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    partial = store.begin(1)
    write(partial, contents(1))
    (partial / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link is not a regular file"):
        store.commit(partial, {})


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 1, attempt=1)
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 1, attempt=1)
    assert names(store) == ["latest.json", "step_00000001"]


def test_a_damaged_newest_is_skipped_loudly(store: CheckpointStore, logged: list[str]) -> None:
    for step in (1, 2, 3):
        save(store, step)
    (store.folder / "step_00000003" / "__0_0.distcp").write_bytes(bytes(2000))
    (store.folder / "step_00000002" / "manifest.json").write_bytes(b"")
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 1)
    assert any("step_00000003 is damaged: __0_0.distcp: its SHA-256" in line for line in logged)
    assert any("step_00000002 is damaged: manifest.json: empty" in line for line in logged)
    assert any("continuing from" in line and "step_00000001" in line for line in logged)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    (store.folder / "step_00000001" / "common.pt").unlink()
    with pytest.raises(NoUsableCheckpointError, match="resume=never"):
        store.newest_verified()
    # Lost altogether: the tracker still says that there was one.
    durable_module.remove_tree(store.folder / "step_00000001")
    with pytest.raises(NoUsableCheckpointError):
        store.newest_verified()


def replace_in_tracker(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tracker = json.loads(path.read_text())
        path.write_text(json.dumps({**tracker, **values}) + "\n")

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 120),
        lambda path: path.write_bytes(b"\xff\xfe garbage"),
        lambda path: path.write_text("[" * 5000),
        lambda path: path.write_text('{"step": 2}'),
        lambda path: path.write_text("null"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        replace_in_tracker(step=7, folder="step_00000007"),
        replace_in_tracker(folder="../elsewhere"),
        replace_in_tracker(folder="/"),
        replace_in_tracker(step="2"),
        replace_in_tracker(manifest_sha256=7),
        replace_in_tracker(manifest_sha256="0" * 64),
    ],
)
def test_any_tracker_leads_to_the_newest_checkpoint(
    damage: Callable[[Path], object], store: CheckpointStore, logged: list[str]
) -> None:
    save(store, 2)
    # The newest save, though not the largest step: the run went back.
    save(store, 1)
    damage(store.folder / "latest.json")
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 1)
    assert any("WARNING" in line and "latest.json" in line for line in logged)


def test_the_tracker_decides(store: CheckpointStore) -> None:
    save(store, 1)
    tracker = (store.folder / "latest.json").read_bytes()
    save(store, 2)
    (store.folder / "latest.json").write_bytes(tracker)
    newest = store.newest_verified()
    assert newest is not None
    assert newest.step == 1


def test_a_given_check_stands_for_all_ranks(store: CheckpointStore, logged: list[str]) -> None:
    save(store, 1)
    save(store, 2)
    newest = store.newest_verified(
        check=lambda one: ["__0_0.distcp: rank 1 says no"] if one.step == 2 else []
    )
    assert newest is not None
    assert newest.step == 1
    assert any("rank 1 says no" in line for line in logged)


def test_opening_names_what_is_wrong(store: CheckpointStore, tmp_path: Path) -> None:
    folder = save(store, 1)
    copy = tmp_path / "best"
    folder.rename(copy)
    assert open_checkpoint(copy).step == 1
    with pytest.raises(DamagedCheckpointError, match="step_00000001: missing"):
        store.open(folder)
    save(store, 2)
    with pytest.raises(ValueError, match=r"give .*step_00000002"):
        store.open(store.folder)
    with pytest.raises(ValueError, match=r"give .*step_00000002"):
        store.open(store.folder.parent)


def test_folder_names() -> None:
    assert step_of(checkpoint_name(120)) == 120
    assert step_of(checkpoint_name(10**9)) == 10**9
    for name in ("step_120", "step_000000120", "step_00000120x", ".step_00000120", "step_0000012०"):
        assert step_of(name) is None
    hidden = parse_hidden(hidden_name(120, "partial"))
    assert hidden is not None
    assert (hidden.step, hidden.kind, hidden.pid) == (120, "partial", os.getpid())
    assert parse_hidden("step_00000120") is None


# Retention


@given(
    saves=st.lists(st.integers(0, 40), max_size=25),
    last=st.integers(1, 6),
    every=st.integers(0, 12),
    keep=st.sets(st.integers(0, 40), max_size=2),
)
def test_retention_keeps_what_it_should(
    saves: list[int], last: int, every: int, keep: set[int]
) -> None:
    # Saving a step again makes it the newest.
    saved = {step: serial for serial, step in enumerate(saves)}
    gone = steps_to_delete(
        [Saved(step=step, serial=serial) for step, serial in saved.items()],
        last=last,
        every=every,
        keep=keep,
    )
    newest = sorted(saved, key=lambda step: saved[step])[-last:]
    kept = set(saved) - set(gone)
    assert len(gone) == len(set(gone))
    assert set(gone) <= set(saved)
    assert kept >= set(newest)
    assert kept >= keep & set(saved)
    for step in saved:
        must_stay = step in newest or step in keep or (every > 0 and step % every == 0)
        assert (step in kept) == must_stay
    assert [saved[step] for step in gone] == sorted(saved[step] for step in gone)


def test_retention_deletes_folders(store: CheckpointStore, logged: list[str]) -> None:
    for step in (5, 10, 15, 20, 25):
        save(store, step)
    assert store.retain(last=2, every=10) == [5, 15]
    assert [one.step for one in store.checkpoints()] == [10, 20, 25]
    assert all(not one.damage() for one in store.checkpoints())
    assert names(store)[0] == "latest.json"
    assert logged == []
    for last, every in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="keep"):
            store.retain(last=last, every=every)


def test_retention_spares_the_trackers_and_the_unreadable(store: CheckpointStore) -> None:
    save(store, 1)
    tracker = (store.folder / "latest.json").read_bytes()
    for step in (2, 3, 4):
        save(store, step)
    (store.folder / "latest.json").write_bytes(tracker)
    (store.folder / "step_00000002" / "manifest.json").unlink()
    assert store.retain(last=1, every=0) == [3]
    (store.folder / "latest.json").write_bytes(b"")
    save_count = len(names(store))
    assert store.retain(last=1, every=0) == []
    assert len(names(store)) == save_count


# Cleaning


def test_cleaning_removes_what_the_dead_left(store: CheckpointStore, logged: list[str]) -> None:
    save(store, 1)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host = os.uname().nodename
    dead = parse_hidden(hidden_name(2, "partial"))
    assert dead is not None
    leftovers = [
        f".step_00000002.partial-{dead.host}-{int(ended.stdout)}-00000000",
        # Of an earlier process with this one's number.
        f".step_00000002.partial-{dead.host}-{os.getpid()}-00000000",
        f".step_00000002.deleted-{host}-1-00000000",
        f".step_00000001.replaced-{dead.host}-{int(ended.stdout)}-00000000",
    ]
    for name in leftovers:
        write_folder(store.folder / name)
    ours = store.begin(3)
    theirs = f".step_00000002.partial-{dead.host}-{os.getppid()}-00000000"
    elsewhere = ".step_00000002.partial-another.host-1-00000000"
    forgotten = ".step_00000002.partial-another.host-2-00000000"
    for name in (theirs, elsewhere, forgotten):
        write_folder(store.folder / name)
    long_ago = time.time() - 7200
    for path in (store.folder / forgotten).iterdir():
        os.utime(path, (long_ago, long_ago))
    os.utime(store.folder / forgotten, (long_ago, long_ago))
    (store.folder / "notes.txt").write_text("mine")
    store.clean()
    kept = {"latest.json", "notes.txt", "step_00000001", ours.name, theirs, elsewhere}
    assert set(names(store)) == kept
    assert sum("left by a save that did not end" in line for line in logged) == 3


def write_folder(path: Path) -> None:
    path.mkdir()
    write(path, {"__0_0.distcp": b"half"})


# Errors


def test_a_full_disk_names_path_and_bytes(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(store, 1)
    partial = store.begin(2)
    write(partial, contents(2))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable_module.os, "write", full)
        with pytest.raises(CheckpointWriteError) as caught:
            store.commit(partial, {"step": 2})
    message = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.path == partial / "manifest.json"
    assert caught.value.needed_bytes is not None
    assert caught.value.needed_bytes > 100
    assert f"{caught.value.needed_bytes} bytes needed" in message
    assert "bytes free" in message
    assert "\n" not in message
    assert names(store) == ["latest.json", first.name]
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 1)


def test_a_save_that_cannot_fit_is_refused_at_once(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointWriteError, match="1000000000000000000 bytes needed"):
        store.begin(1, needed_bytes=10**18)
    assert names(store) == []
    store.begin(1, needed_bytes=10)


def test_an_unwritable_place_is_named(store: CheckpointStore) -> None:
    store.folder.write_text("a file")
    with pytest.raises(CheckpointWriteError, match="checkpoints"):
        store.begin(1)


def test_write_errors_keep_the_reason_underneath(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp_path / "__0_0.distcp"))
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed") from error
    except RuntimeError as error:
        told = write_error(error, tmp_path, needed_bytes=5)
    assert told.errno == errno.EDQUOT
    assert told.path == tmp_path / "__0_0.distcp"
    assert write_error(told, tmp_path) is told
    plain = write_error(RuntimeError("failed\nbadly"), tmp_path / "x")
    assert str(plain) == f"cannot write {tmp_path / 'x'}: RuntimeError: failed badly"


def test_errors_travel_between_ranks(store: CheckpointStore) -> None:
    damaged = DamagedCheckpointError(store.folder, ["a: missing", "b: missing"])
    full = CheckpointWriteError(store.folder, "full", number=errno.ENOSPC, needed_bytes=7)
    for error in (damaged, full):
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error)
        assert str(copied) == str(error)
    assert pickle.loads(pickle.dumps(damaged)).problems == damaged.problems
    assert pickle.loads(pickle.dumps(full)).errno == errno.ENOSPC


def test_reading_a_manifest_alone_reads_no_other_file(store: CheckpointStore) -> None:
    folder = save(store, 1)
    (folder / "common.pt").unlink()
    checkpoint = read_checkpoint(folder)
    assert checkpoint.size == sum(len(content) for content in contents(1).values())
    with pytest.raises(DamagedCheckpointError, match=r"common\.pt: missing"):
        checkpoint.verify()
