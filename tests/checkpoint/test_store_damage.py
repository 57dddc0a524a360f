"""Damaged checkpoints are refused, and the message names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store_helpers import contents, save

from mone_megatron.checkpoint import CheckpointStore, DamagedCheckpointError, open_checkpoint

FLIPS = 200


def refusal(folder: Path) -> DamagedCheckpointError:
    with pytest.raises(DamagedCheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return caught.value


def test_random_bit_flips(store: CheckpointStore) -> None:
    folder = save(store, 1)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == 6
    choose = random.Random(1234)
    refused = 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        problems = refusal(folder).problems
        assert len(problems) == 1
        assert problems[0].startswith(path.relative_to(folder).as_posix() + ": ")
        refused += 1
        path.write_bytes(whole)
    assert refused == FLIPS
    open_checkpoint(folder)


def test_every_bit_of_a_manifest(store: CheckpointStore) -> None:
    folder = save(store, 1)
    path = folder / "manifest.json"
    whole = path.read_bytes()
    # Each byte once, the bit varying: every field, quote and space.
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert refusal(folder).problems[0].startswith("manifest.json: ")


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"attempt": 0', '"attempt": 9'))


def rewrite_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """An edit that also corrects the manifest's own digest."""
    import hashlib

    path = folder / "manifest.json"
    body = json.loads(path.read_text())["manifest"]
    change(body)

    def spell(value: object) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True).encode()

    digest = hashlib.sha256(spell(body)).hexdigest()
    path.write_bytes(spell({"manifest": body, "sha256": digest}) + b"\n")


def zero_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[512:1024] = bytes(512)
    path.write_bytes(content)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def replace_by_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


STRUCTURAL: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "file removed": ("__0_0.distcp: missing", lambda c, o: (c / "__0_0.distcp").unlink()),
    "metadata removed": (".metadata: missing", lambda c, o: (c / ".metadata").unlink()),
    "file truncated": (
        "common.pt: 50 bytes",
        lambda c, o: (c / "common.pt").write_bytes((c / "common.pt").read_bytes()[:50]),
    ),
    "file emptied": ("common.pt: 0 bytes", lambda c, o: (c / "common.pt").write_bytes(b"")),
    "file grown": ("empty: 1 bytes", lambda c, o: (c / "empty").write_bytes(b"x")),
    "block zeroed": ("__1_0.distcp: its SHA-256", lambda c, o: zero_block(c / "__1_0.distcp")),
    "shard of another save": (
        "__0_0.distcp: its SHA-256",
        lambda c, o: shutil.copy(o / "__0_0.distcp", c / "__0_0.distcp"),
    ),
    "shards of two ranks swapped": (
        "__1_0.distcp: its SHA-256",
        lambda c, o: (
            (c / "__0_0.distcp").rename(c / "x"),
            (c / "__1_0.distcp").rename(c / "__0_0.distcp"),
            (c / "x").rename(c / "__1_0.distcp"),
        ),
    ),
    "file renamed": (
        "__0_1.distcp: not in manifest.json",
        lambda c, o: (c / "__0_0.distcp").rename(c / "__0_1.distcp"),
    ),
    "extra file": (
        "__9_0.distcp: not in manifest.json",
        lambda c, o: (c / "__9_0.distcp").write_bytes(b"x"),
    ),
    "extra folder": ("more: not in manifest.json", lambda c, o: (c / "more").mkdir()),
    "file replaced by a folder": (
        "empty: not a regular file",
        lambda c, o: ((c / "empty").unlink(), (c / "empty").mkdir()),
    ),
    "file replaced by a link": (
        "common.pt: not a regular file",
        lambda c, o: replace_by_link(c / "common.pt", o / "common.pt"),
    ),
    "folder inside replaced by a link": (
        "tokenizer: not a regular file",
        lambda c, o: (
            shutil.rmtree(c / "tokenizer"),
            (c / "tokenizer").symlink_to(o / "tokenizer"),
        ),
    ),
    "manifest missing": ("manifest.json: missing", lambda c, o: (c / "manifest.json").unlink()),
    "manifest empty": (
        "manifest.json: empty",
        lambda c, o: (c / "manifest.json").write_bytes(b""),
    ),
    "manifest edited": ("manifest.json: it is not as", lambda c, o: edit_manifest(c)),
    "manifest spelled otherwise": (
        "manifest.json: it is not as",
        lambda c, o: (c / "manifest.json").write_bytes((c / "manifest.json").read_bytes() + b"\n"),
    ),
    "manifest with a key twice": (
        "manifest.json: it is not as",
        lambda c, o: (c / "manifest.json").write_text(
            (c / "manifest.json").read_text().replace("{", '{"manifest": {"step": 9},', 1)
        ),
    ),
    "manifest of another save": (
        "manifest.json: it is of step 2",
        lambda c, o: shutil.copy(o / "manifest.json", c / "manifest.json"),
    ),
    "manifest a link": (
        "manifest.json: cannot be read",
        lambda c, o: replace_by_link(c / "manifest.json", o / "manifest.json"),
    ),
    "manifest nested deeply": (
        "manifest.json: not JSON",
        lambda c, o: (c / "manifest.json").write_text("[" * 100_000),
    ),
    "manifest of no fields": (
        "manifest.json: its fields",
        lambda c, o: rewrite_manifest(c, lambda body: body.pop("facts")),
    ),
    "manifest of another version": (
        "manifest.json: its format is 2",
        lambda c, o: rewrite_manifest(c, lambda body: body.update(format=2)),
    ),
    "manifest pointing outside": (
        "manifest.json: it names the file '../../secret'",
        lambda c, o: rewrite_manifest(
            c, lambda body: body["files"].update({"../../secret": body["files"]["empty"]})
        ),
    ),
    "manifest naming an absolute path": (
        "manifest.json: it names the file '/etc/passwd'",
        lambda c, o: rewrite_manifest(
            c, lambda body: body["files"].update({"/etc/passwd": body["files"]["empty"]})
        ),
    ),
    "folder renamed": (
        "manifest.json: it is of step 1",
        lambda c, o: (o.rename(o.parent / "aside"), c.rename(o), c.symlink_to(o)),
    ),
    "folder replaced by a file": (
        "step_00000001: not a folder",
        lambda c, o: replace_by_file(c),
    ),
    "folder missing": ("step_00000001: missing", lambda c, o: shutil.rmtree(c)),
}


@pytest.mark.parametrize("damage", STRUCTURAL)
def test_structural_damage(damage: str, store: CheckpointStore) -> None:
    folder, other = save(store, 1), save(store, 2)
    says, apply = STRUCTURAL[damage]
    apply(folder, other)
    damaged = other if damage == "folder renamed" else folder
    assert any(problem.startswith(says) for problem in refusal(damaged).problems)


def test_all_damage_is_told_at_once(store: CheckpointStore) -> None:
    folder = save(store, 1)
    for name in contents(1):
        (folder / name).write_bytes(b"?" * 7)
    error = refusal(folder)
    assert len(error.problems) == len(contents(1))
    assert "and 1 more" in str(error)
