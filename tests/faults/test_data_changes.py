"""Rows 15 and 16: data that changed under a resume, and data that is damaged, are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from faults_helpers import SMALL, losses
from faults_runs import Ended, Main, attempt, mains
from faults_table import Tally

from mone_megatron.testing.launch import REPOSITORY

Count = Callable[[int, str], AbstractContextManager[Tally]]
CHANGED = "data bytes, weights or order changed under a resume: refused by key or file"
DAMAGED = "damaged data, tokens past the vocabulary: refused by file before a process group"
STALE = "index caches of other data, unfinished or damaged ones: the losses of a fresh cache"
RUN = (*SMALL, "data.source=indexed", "train.steps=3", "checkpoint.interval=2")
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "en", "ir", "ot", "us")]


def write_texts(path: Path, seed: int, documents: int = 120) -> None:
    choose = np.random.default_rng(seed)
    with path.open("w") as stream:
        for _ in range(documents):
            stream.write(json.dumps({"text": " ".join(choose.choice(WORDS, size=40))}) + "\n")


def preprocess(source: Path, prefix: Path, *options: str) -> None:
    command = [sys.executable, "tools/preprocess_data.py", str(source), "--output", str(prefix)]
    subprocess.run([*command, *options], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora "a", "b" and "other", of one tokenizer; as the tool makes them."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("a", "b", "other")):
        write_texts(folder / f"{name}.jsonl", seed)
        tokenizer = (
            ("--tokenizer", str(folder / "a.tokenizer")) if seed else ("--train-tokenizer", "300")
        )
        preprocess(folder / f"{name}.jsonl", folder / name, *tokenizer)
    return folder


def copy_corpus(prefix: Path, target: Path) -> None:
    """Under another name, sidecar and tokenizer with it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for end in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{prefix}{end}", f"{target}{end}")
    tokenizer = json.loads(Path(f"{prefix}.meta.json").read_text())["tokenizer"]
    shutil.copytree(prefix.parent / tokenizer, target.parent / tokenizer, dirs_exist_ok=True)


def make_foreign(prefix: Path) -> None:
    """As another Megatron tool leaves it: without a sidecar."""
    Path(f"{prefix}.meta.json").unlink()


@dataclass(frozen=True)
class Change:
    """One way to change the data, in a folder with copies of "a" and "b"."""

    name: str
    named: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    edit: Callable[[Path, Path], None] = lambda folder, corpora: None


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def flip_with_sidecar(folder: Path, corpora: Path) -> None:
    """One token changed by someone who knows the sidecar."""
    from mone_megatron.data.files import quick_digest, sha256_file

    path = folder / "a.bin"
    flip(path, 100)
    sidecar = folder / "a.meta.json"
    digests = {"bin_sha256": sha256_file(path), "bin_quick_digest": quick_digest(path)}
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **digests}))


def reorder_documents(folder: Path, corpora: Path) -> None:
    lines = (corpora / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "turned.jsonl").write_text("".join(reversed(lines)))
    tokenizer = ("--tokenizer", str(corpora / "a.tokenizer"))
    preprocess(folder / "turned.jsonl", folder / "a", *tokenizer, "--overwrite")
    # The tool leaves one beside it, under another name.
    assert (folder / "a.bin").stat().st_size == (corpora / "a.bin").stat().st_size


CHANGES = [
    Change("nothing changed", ()),
    Change("a byte of a .bin", ("data.paths[0]", "a.bin"),
           edit=lambda folder, corpora: flip(folder / "a.bin", 100)),
    Change("a byte of an .idx", ("data.paths[1]", "b.idx"),
           edit=lambda folder, corpora: flip(folder / "b.idx", 60)),
    Change("a token and its sidecar", ("data_fingerprint", "data.paths"), edit=flip_with_sidecar),
    Change("another corpus of that name", ("data_fingerprint", "data.paths"),
           edit=lambda folder, corpora: copy_corpus(corpora / "other", folder / "a")),
    Change("the order of documents", ("data_fingerprint", "data.paths"), edit=reorder_documents),
    Change("the weights", ("data_fingerprint", "data.weights"), ("data.weights=[2.0,1.0]",)),
    Change("no weights", ("data_fingerprint", "data.weights"), ("data.weights=[]",)),
    Change("the order of the paths", ("data_fingerprint", "data.paths"), ("data.paths=[{b},{a}]",)),
    Change("a path left out", ("data_fingerprint", "data.paths"),
           ("data.paths=[{a}]", "data.weights=[]")),
    Change("the split", ("data_fingerprint", "data.split"), ("data.split=[0.8,0.2,0.0]",)),
    Change("the seed", ("train.seed",), ("train.seed=5",)),
    Change("the sequence length", ("train.seq_length",), ("train.seq_length=32",)),
    Change("the batch", ("train.global_batch_size",), ("train.global_batch_size=4",)),
    Change("a sidecar removed", ("data_fingerprint", "data.paths"),
           ("data.tokenizer={folder}/a.tokenizer",),
           edit=lambda folder, corpora: make_foreign(folder / "a")),
]  # fmt: skip


def test_data_changed_under_a_resume(
    tmp_path: Path, corpora: Path, tally: Count, full: bool
) -> None:
    jobs: dict[str, Main] = {}
    for number, change in enumerate(CHANGES if full else CHANGES[:7]):
        folder = tmp_path / str(number)
        for name in ("a", "b"):
            copy_corpus(corpora / name, folder / name)
        change.edit(folder, corpora)
        # The first made the checkpoint, from data of the same bytes at another place.
        same = (
            *RUN,
            f"data.paths=[{folder}/a,{folder}/b]",
            "data.weights=[1.0,1.0]",
            f"data.cache_dir={tmp_path}/cache",
            f"run.dir={tmp_path}/run",
        )
        if not jobs:
            jobs["first"] = Main((*same, "checkpoint.resume=never"))
        places = {"a": folder / "a", "b": folder / "b", "folder": folder}
        changed = (override.format(**places) for override in change.overrides)
        jobs[change.name] = Main((*same, "checkpoint.resume=auto", *changed))
    ended = mains(jobs, tmp_path / "mains")
    assert ended["first"].code == 0, ended["first"].said
    # Data of the same bytes elsewhere are the same data.
    assert ended["nothing changed"].code == 0, ended["nothing changed"].said
    assert "resumed from" in ended["nothing changed"].said
    with tally(15, CHANGED) as t:
        for change in CHANGES[1:]:
            if change.name in ended:
                with attempt(t, change.name):
                    ended[change.name].assert_refused(*change.named)


def cut(path: Path, size: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:size] if size > 0 else content[: len(content) + size])


def put_token(prefix: Path, token: int) -> None:
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    tokens[tokens.size // 2] = token
    tokens.tofile(f"{prefix}.bin")


def foreign_with_token(folder: Path, corpora: Path) -> None:
    make_foreign(folder / "a")
    put_token(folder / "a", 300)


def foreign_scanned_before(folder: Path, corpora: Path) -> None:
    """The first run over it remembered its largest token; then a token was changed."""
    from mone_megatron.config.schema import Config, DataConfig, TrainConfig
    from mone_megatron.data.prepare import prepare_data

    make_foreign(folder / "a")
    data = DataConfig(
        source="indexed",
        paths=(str(folder / "a"),),
        tokenizer=str(corpora / "a.tokenizer"),
        cache_dir=str(folder / "cache"),
    )
    prepare_data(Config(data=data, train=TrainConfig(seq_length=16)))
    put_token(folder / "a", 65535)


OTHER_TOKENIZER = ("data.tokenizer={corpora}/a.tokenizer",)
DAMAGES = [
    Change("a .bin cut by a token", ("a.bin is truncated",),
           edit=lambda folder, corpora: cut(folder / "a.bin", -2)),
    Change("an .idx cut by a byte", ("a.idx is truncated",),
           edit=lambda folder, corpora: cut(folder / "a.idx", -1)),
    Change("a token past the tokenizer", ("a.bin", "300"), OTHER_TOKENIZER,
           edit=foreign_with_token),
    Change("the same in a file that was scanned before", ("a.bin", "65535"), OTHER_TOKENIZER,
           edit=foreign_scanned_before),
    Change("tokens past model.vocab_size", ("model.vocab_size=200",), ("model.vocab_size=200",)),
    Change("half a .bin", ("a.bin is truncated",),
           edit=lambda folder, corpora: cut(folder / "a.bin", 3000)),
    Change("an empty .bin", ("a.bin is an empty corpus",),
           edit=lambda folder, corpora: (folder / "a.bin").write_bytes(b"") and None),
    Change("no .bin", ("a.bin does not exist",),
           edit=lambda folder, corpora: (folder / "a.bin").unlink()),
    Change("a .bin too long", ("a.bin is longer",),
           edit=lambda folder, corpora: (folder / "a.bin").open("ab").write(b"xx") and None),
    Change("the header of an .idx alone", ("a.idx is truncated",),
           edit=lambda folder, corpora: cut(folder / "a.idx", 34)),
    Change("20 bytes of an .idx", ("a.idx is truncated",),
           edit=lambda folder, corpora: cut(folder / "a.idx", 20)),
    Change("an empty .idx", ("a.idx is not",),
           edit=lambda folder, corpora: (folder / "a.idx").write_bytes(b"") and None),
    Change("no .idx", ("a.idx does not exist",),
           edit=lambda folder, corpora: (folder / "a.idx").unlink()),
    Change("another file for an .idx", ("a.idx is not",),
           edit=lambda folder, corpora: (folder / "a.idx").write_bytes(b"PK\3\4" * 99) and None),
    Change("lengths that do not add up", ("a.idx is damaged",),
           edit=lambda folder, corpora: flip(folder / "a.idx", 34)),
    Change("the .idx of another corpus", ("a.idx",),
           edit=lambda folder, corpora: shutil.copy(corpora / "b.idx", folder / "a.idx") and None),
    Change("a sidecar cut short", ("a.meta.json is damaged",),
           edit=lambda folder, corpora: cut(folder / "a.meta.json", 50)),
    Change("a damaged tokenizer", ("tokenizer.json",),
           edit=lambda folder, corpora: cut(folder / "a.tokenizer" / "tokenizer.json", 100)),
]  # fmt: skip


def test_damaged_data(tmp_path: Path, corpora: Path, tally: Count, full: bool) -> None:
    jobs: dict[str, Main] = {}
    for number, damage in enumerate(DAMAGES if full else DAMAGES[:10]):
        folder = tmp_path / str(number)
        copy_corpus(corpora / "a", folder / "a")
        damage.edit(folder, corpora)
        places = {"folder": folder, "corpora": corpora}
        jobs[damage.name] = Main(
            (
                *RUN,
                f"data.paths=[{folder}/a]",
                f"data.cache_dir={folder}/cache",
                f"run.dir={tmp_path}/run",
                *(override.format(**places) for override in damage.overrides),
            )
        )
    ended = mains(jobs, tmp_path / "mains")
    with tally(16, DAMAGED) as t:
        for damage in DAMAGES:
            if damage.name in ended:
                with attempt(t, damage.name):
                    ended[damage.name].assert_refused(*damage.named)
                    assert not ended[damage.name].opened
        t.note = f"at most {max(one.seconds for one in ended.values()):.2f} s each, imports aside"


def truncate_indices(cache: Path) -> None:
    for path in cache.glob("indices/*/*.npy"):
        cut(path, -8)


def leave_unfinished(cache: Path) -> None:
    """As a build that was killed leaves it."""
    truncate_indices(cache)
    for marker in cache.glob("indices/*/complete"):
        marker.unlink()


def test_stale_index_caches(tmp_path: Path, corpora: Path, tally: Count, full: bool) -> None:
    """The corpus under a path changes, and so does nothing else that a run is told."""
    place = tmp_path / "corpus" / "a"
    cache = tmp_path / "cache"

    def job(name: str, folder: Path) -> dict[str, Main]:
        paths = (f"data.paths=[{place}]", f"data.cache_dir={folder}", f"run.dir={tmp_path / name}")
        return {name: Main((*RUN, "checkpoint.interval=0", *paths))}

    def run(jobs: dict[str, Main]) -> dict[str, Ended]:
        return mains(jobs, tmp_path / "mains")

    copy_corpus(corpora / "a", place)
    before = run(job("of the first corpus", cache))
    assert before["of the first corpus"].code == 0, before["of the first corpus"].said
    copy_corpus(corpora / "other", place)
    after = run(job("of another corpus", cache) | job("fresh", tmp_path / "fresh"))
    assert after["fresh"].code == 0, after["fresh"].said
    expected = losses(tmp_path / "fresh")
    assert expected != losses(tmp_path / "of the first corpus")
    tried = ["of another corpus"]
    if full:
        leave_unfinished(cache)
        after |= run(job("unfinished", cache))
        truncate_indices(cache)
        after |= run(job("cut short", cache))
        for path in cache.glob("indices/*/*shuffle_index.npy"):
            flip(path, path.stat().st_size - 4)
        after |= run(job("with a flipped bit", cache))
        tried += ["unfinished", "cut short", "with a flipped bit"]
    with tally(16, STALE) as t:
        for name in tried:
            with attempt(t, name):
                assert after[name].code == 0, after[name].said[-600:]
                assert losses(tmp_path / name) == expected
