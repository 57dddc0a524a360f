"""Row 20: files made to run code or to reach outside: nothing runs, and the file is named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from faults_helpers import SMALL, step_folder
from faults_runs import Ended, Main, attempt, mains, pretrain
from faults_table import Tally
from test_data_changes import RUN as INDEXED
from test_data_changes import preprocess, write_texts

from mone_megatron.checkpoint.digests import MANIFEST_NAME, digest_files
from mone_megatron.checkpoint.manifest import encode_manifest, read_manifest
from mone_megatron.config.load import CONF_DIR
from mone_megatron.megatron_release import megatron_release

Count = Callable[[int, str], AbstractContextManager[Tally]]
PICKLES = "pickles that run code in a checkpoint whose manifest is right: not run, file named"
OUTSIDE = "manifest, tracker, index or sidecar naming files outside: refused by name"
CONFIGS = "`_target_` in an override or a configuration file: not built, refused by key"
REMOTE = "a tokenizer folder with code of its own: not run"
RUN = (*SMALL, "train.steps=2", "checkpoint.interval=2")


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def payloads(marker: Path) -> dict[str, Any]:
    """Objects that leave ``marker`` behind when they are unpickled."""
    return {
        "mkdir": Call(os.mkdir, str(marker)),
        "exec": {"deep": [Call(exec, f"open({str(marker)!r}, 'w')")]},
        "system": Call(os.system, f"touch {marker}"),
    }


def torch_file(payload: Any) -> bytes:
    out = BytesIO()
    torch.save(payload, out)
    return out.getvalue()


def sign(checkpoint: Path, **changes: Any) -> None:
    """A manifest for what is there now, as someone who knows the format writes it."""
    manifest, _ = read_manifest(checkpoint)
    (checkpoint / MANIFEST_NAME).unlink()
    manifest = replace(manifest, files=digest_files(checkpoint), **changes)
    write_manifest(checkpoint, encode_manifest(manifest))


def write_manifest(checkpoint: Path, text: bytes) -> None:
    (checkpoint / MANIFEST_NAME).write_bytes(text)
    tracker = checkpoint.parent / "latest.json"
    content = json.loads(tracker.read_text())
    content["manifest_sha256"] = hashlib.sha256(text).hexdigest()
    tracker.write_text(json.dumps(content) + "\n")


def items(checkpoint: Path) -> Iterator[tuple[str, bool, int, int]]:
    """(file, whether it is an object, offset, bytes) of what lies in the shards."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        kind = type(metadata.state_dict_metadata[index.fqn]).__name__
        yield place.relative_path, kind == "BytesStorageMetadata", place.offset, place.length


def put(checkpoint: Path, file: str, offset: int, content: bytes) -> None:
    """In the place of one item of a shard, with the metadata that say so."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if (place.relative_path, place.offset) == (file, offset):
            assert len(content) <= place.length
            metadata.storage_data[index] = replace(place, length=len(content))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    whole = bytearray((checkpoint / file).read_bytes())
    whole[offset : offset + len(content)] = content
    (checkpoint / file).write_bytes(bytes(whole))


@dataclass(frozen=True)
class Hostile:
    """One checkpoint of one run folder, spoilt by ``edit``."""

    named: tuple[str, ...]
    edit: Callable[[Path], None]


def hostile_checkpoints(whole: Path, marker: Path) -> dict[str, Hostile]:
    found: dict[str, Hostile] = {}
    for name, payload in payloads(marker).items():

        def metadata(checkpoint: Path, payload: Any = payload) -> None:
            (checkpoint / ".metadata").write_bytes(pickle.dumps(payload))

        def common(checkpoint: Path, payload: Any = payload) -> None:
            (checkpoint / "common.pt").write_bytes(torch_file(payload))

        found[f"{name} in .metadata"] = Hostile((".metadata wants",), metadata)
        if (whole / "common.pt").exists():  # until megatron-core 0.16; then it is an object
            found[f"{name} in common.pt"] = Hostile(("common.pt wants",), common)
        content = torch_file(payload)
        for file in sorted({file for file, *_ in items(whole)}):
            for is_object in (False, True):
                places = [
                    (length, offset)
                    for at, kind, offset, length in items(whole)
                    if at == file and kind == is_object and length >= len(content)
                ]
                if not places:
                    continue
                _, offset = max(places)

                def shard(
                    checkpoint: Path,
                    file: str = file,
                    offset: int = offset,
                    content: bytes = content,
                ) -> None:
                    put(checkpoint, file, offset, content)

                what = "an object" if is_object else "a tensor"
                found[f"{name} for {what} in {file}"] = Hostile((f"{file} wants",), shard)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sound checkpoint of step 2."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = pretrain(*RUN, f"run.dir={run}")
    assert ended.code == 0, ended.said
    return run


def test_pickles_in_a_checkpoint(tmp_path: Path, whole: Path, tally: Count, full: bool) -> None:
    marker = tmp_path / "marker"
    hostile = hostile_checkpoints(step_folder(whole, 2), marker)
    kinds = {" ".join(name.split()[1:4]) for name in hostile}
    assert {"in .metadata", "for a tensor", "for an object"} <= kinds
    assert ("in common.pt" in kinds) is (megatron_release() < (0, 17, 0))
    if not full:
        hostile = {name: one for name, one in hostile.items() if name.startswith("mkdir")}
    jobs = {}
    for number, (name, one) in enumerate(hostile.items()):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        one.edit(step_folder(run, 2))
        sign(step_folder(run, 2))
        # In turn as the run's newest and as one that is named.
        resume = "auto" if number % 2 == 0 else step_folder(run, 2)
        jobs[name] = Main((*RUN, f"run.dir={run}", f"checkpoint.resume={resume}"))
    ended = mains(jobs, tmp_path / "mains")
    with tally(20, PICKLES) as t:
        for name, one in hostile.items():
            with attempt(t, name):
                ended[name].assert_refused(*one.named)
                assert not marker.exists()
    # The payloads do work where nothing holds them back.
    for payload in payloads(marker).values():
        pickle.loads(pickle.dumps(payload))
        assert marker.exists()
        if marker.is_dir():
            marker.rmdir()
        else:
            marker.unlink()


def manifest_outside(checkpoint: Path) -> None:
    manifest, _ = read_manifest(checkpoint)
    (checkpoint.parent / "outside").write_bytes(b"x")
    entry = next(iter(manifest.files.values()))
    text = encode_manifest(replace(manifest, files={**manifest.files, "../outside": entry}))
    write_manifest(checkpoint, text)


def metadata_outside(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index, place = next(iter(metadata.storage_data.items()))
    outside = f"../../{place.relative_path}"
    metadata.storage_data[index] = replace(place, relative_path=outside)
    shutil.copy(checkpoint / place.relative_path, checkpoint.parent.parent)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


def link_outside(checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    path.rename(checkpoint.parent.parent / path.name)
    path.symlink_to(checkpoint.parent.parent / path.name)


def test_names_that_lead_outside(tmp_path: Path, whole: Path, tally: Count) -> None:
    hostile = {
        "a manifest": Hostile(("../outside", "not inside the checkpoint"), manifest_outside),
        "the index of the shards": Hostile((".metadata", "not inside"), metadata_outside),
        "a link": Hostile(("metadata.json",), link_outside),
    }
    jobs = {}
    for number, (name, one) in enumerate(hostile.items()):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        one.edit(step_folder(run, 2))
        resume = f"checkpoint.resume={step_folder(run, 2)}"
        jobs[name] = Main((*RUN, f"run.dir={run}", resume))
    run = tmp_path / "tracker"
    shutil.copytree(whole, run)
    shutil.move(step_folder(run, 2), tmp_path / "elsewhere")
    tracker = run / "checkpoints" / "latest.json"
    content = {**json.loads(tracker.read_text()), "folder": "../../elsewhere"}
    tracker.write_text(json.dumps(content) + "\n")
    jobs["a tracker"] = Main((*RUN, f"run.dir={run}", "checkpoint.resume=auto"))
    write_texts(tmp_path / "a.jsonl", 0)
    preprocess(tmp_path / "a.jsonl", tmp_path / "a", "--train-tokenizer", "300")
    sidecar = tmp_path / "a.meta.json"
    values = {**json.loads(sidecar.read_text()), "tokenizer": "../a.tokenizer"}
    sidecar.write_text(json.dumps(values))
    paths = (f"data.paths=[{tmp_path}/a]", f"data.cache_dir={tmp_path}/cache")
    jobs["a sidecar"] = Main((*INDEXED, *paths, f"run.dir={tmp_path / 'sidecar'}"))
    ended = mains(jobs, tmp_path / "mains")
    with tally(20, OUTSIDE) as t:
        for name, one in hostile.items():
            with attempt(t, name):
                ended[name].assert_refused(*one.named)
        with attempt(t, "a tracker"):
            ended["a tracker"].assert_refused("no checkpoint in")
            assert "latest.json is damaged" in ended["a tracker"].said
        with attempt(t, "a sidecar"):
            ended["a sidecar"].assert_refused("a.meta.json")


OVERRIDES = [
    ("+model._target_=os.mkdir", "model._target_"),
    ("+_target_=os.mkdir", "_target_"),
    ("+run={_target_:os.mkdir,path:{marker}}", "run._target_"),
    ("+hydra.callbacks.x._target_=os.mkdir", "hydra.callbacks.x._target_"),
    ("+hydra.callbacks={x:{_target_:os.mkdir,path:{marker}}}", "hydra.callbacks.x._target_"),
    ("hydra/launcher=joblib", "hydra/launcher"),
]


def test_targets_in_configurations(tmp_path: Path, tally: Count, full: bool) -> None:
    marker = tmp_path / "marker"
    jobs = {
        override: Main((*RUN, override.replace("{marker}", str(marker))))
        for override, _ in OVERRIDES
    }
    ended = mains(jobs, tmp_path / "mains", watch=False)
    with tally(20, CONFIGS) as t:
        for override, key in OVERRIDES:
            with attempt(t, override):
                ended[override].assert_refused(f"error: {key}")
                assert not marker.exists()
        # Configuration folders of someone else: a key, Hydra's own sections, YAML's own objects.
        for name, text in {
            "a key": f"_target_: os.mkdir\npath: {marker}\n",
            "a Hydra callback": (
                "# @package _global_\nhydra:\n  callbacks:\n    x:\n"
                f"      _target_: os.mkdir\n      path: {marker}\n"
            ),
            "a YAML object": f"num_layers: !!python/object/apply:os.mkdir ['{marker}']\n",
        }.items():
            if not full and name != "a Hydra callback":
                continue
            folder = tmp_path / name.replace(" ", "_")
            shutil.copytree(CONF_DIR, folder)
            (folder / "model" / "tiny.yaml").write_text(text)
            for flag in (f"--config-path={folder}", f"--config-dir={folder}"):
                with attempt(t, f"{name} with {flag.split('=')[0]}"):
                    run = pretrain(flag, *RUN, f"run.dir={tmp_path / 'run'}")
                    assert not marker.exists(), "it ran"
                    run.assert_refused(f"error: {flag}: ")


def remote_tokenizer(folder: Path, marker: Path, *, whole: Path | None) -> None:
    """What a hub's tokenizer with code looks like; ``whole`` is a tokenizer to put beside it."""
    if whole is None:
        folder.mkdir()
    else:
        shutil.copytree(whole, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: ...\n")
    settings = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_that_brings_code(tmp_path: Path, tally: Count) -> None:
    marker = tmp_path / "marker"
    write_texts(tmp_path / "a.jsonl", 0)
    preprocess(tmp_path / "a.jsonl", tmp_path / "a", "--train-tokenizer", "300")
    remote_tokenizer(tmp_path / "code", marker, whole=None)
    remote_tokenizer(tmp_path / "both", marker, whole=tmp_path / "a.tokenizer")
    common = (*INDEXED, f"data.paths=[{tmp_path}/a]", f"data.cache_dir={tmp_path}/cache")

    def job(name: str) -> Main:
        tokenizer = f"data.tokenizer={tmp_path / name}"
        return Main((*common, tokenizer, f"run.dir={tmp_path / 'run' / name}"))

    ended: dict[str, Ended] = mains({name: job(name) for name in ("code", "both")}, tmp_path / "m")
    with tally(20, REMOTE) as t:
        with attempt(t, "nothing but code"):
            ended["code"].assert_refused("data.tokenizer", "holds no tokenizer.json")
            assert not marker.exists()
        with attempt(t, "code beside a tokenizer.json"):
            assert ended["both"].code == 0, ended["both"].said
            assert not marker.exists()
            # Nor does it travel with a checkpoint.
            assert not list((tmp_path / "run").rglob("evil*"))
            assert list((tmp_path / "run").rglob("tokenizer.json"))
    # The tool that makes data loads tokenizers, too.
    command = [sys.executable, "tools/preprocess_data.py", str(tmp_path / "a.jsonl"), "--tokenizer"]
    command += [str(tmp_path / "both"), "--output", str(tmp_path / "again")]
    with tally(20, REMOTE) as t, attempt(t, "tools/preprocess_data.py"):
        subprocess.run(command, cwd=CONF_DIR.parent, check=True, capture_output=True)
        assert not marker.exists()
