"""Exports are uploaded by the real client, to a server on loopback that stands in for the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import READ_TOKEN, TOKEN, Hub, Repository, hub_stand_in

from mone_megatron.hf.hub import HubRepository, find_repository, upload
from mone_megatron.testing.launch import REPOSITORY, run_layouts

_QUICK = [
    "device=cpu", "device.threads=1", "logging.report=false",
    "logging.wandb.mode=disabled", "train.steps=2",
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process knows, with a token for it, and none of the user's."""
    with hub_stand_in() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def export_hf(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/export_hf.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_export_is_uploaded_whole_and_private(hub: Hub, tmp_path: Path) -> None:
    run_layouts(
        {"run": ["experiment=tiny_mone", "checkpoint.interval=2", *_QUICK]},
        processes=1,
        folder=tmp_path,
    )
    done = export_hf(
        tmp_path / "run", "--output", tmp_path / "hf", "--push-to-hub", "my-lab/mone",
        HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/my-lab/mone" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    repository = hub.repositories["my-lab/mone"]
    assert repository.private
    assert repository.messages == ["Step 2 of tiny_mone"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(written)
    assert repository.files == {".gitattributes": b"", **written}
    assert b"pipeline_tag: text-generation" in repository.files["README.md"]
    # Once more: it is no empty repository any more, which is said before anything is exported.
    again = export_hf(
        tmp_path / "run", "--output", tmp_path / "again", "--push-to-hub", "my-lab/mone",
        HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert again.returncode == 2
    assert "my-lab/mone is there and holds README.md and" in again.stderr
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_as_visible_as_was_asked(hub: Hub, private: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a model")
    repository = find_repository("somebody/model", private=private)
    assert not hub.repositories
    upload(tmp_path, repository, "Step 1")
    assert hub.repositories["somebody/model"].private is private
    assert hub.repositories["somebody/model"].files["README.md"] == b"a model"


def test_an_empty_repository_is_filled(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["my-lab/model"] = Repository(private=True)
    (tmp_path / "config.json").write_text("{}")
    upload(tmp_path, find_repository("my-lab/model", private=True), "Step 1")
    assert set(hub.repositories["my-lab/model"].files) == {".gitattributes", "config.json"}


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("model", TOKEN, "'model' names no owner; give it as OWNER/NAME"),
        ("my-lab/mo del", TOKEN, "mo del"),
        ("a/b/c", TOKEN, "a/b/c"),
        ("my-lab/model", None, "there is no token; set HF_TOKEN, or log in"),
        ("my-lab/model", "hf_wrong", "http://127.0.0.1"),
        ("my-lab/model", READ_TOKEN, "the token may only read"),
        ("others/model", TOKEN, "somebody's, who is not in others; use one of somebody, my-lab"),
        ("my-lab/full", TOKEN, "my-lab/full is there and holds config.json and 1 more"),
        ("my-lab/public", TOKEN, "my-lab/public is there and public; --public, or change"),
    ],
)
def test_refusals_come_before_anything_is_made(
    name: str, token: str | None, says: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["my-lab/full"] = Repository(True, {"config.json": b"", "notes.txt": b""})
    hub.repositories["my-lab/public"] = Repository(private=False)
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=r"^--push-to-hub: ") as caught:
        find_repository(name, private=True)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [line for line in hub.asked if not line.startswith("GET ")]


def test_a_server_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"^--push-to-hub: http://127\.0\.0\.1:9: .*refused"):
        find_repository("my-lab/other", private=True)


def test_a_broken_upload_says_where_the_export_is(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "/commit/"
    (tmp_path / "config.json").write_text("{}")
    repository = HubRepository("my-lab/model", True, hub.url)
    with pytest.raises(ValueError, match="the export is whole in") as caught:
        upload(tmp_path, repository, "Step 1")
    assert f"hf upload my-lab/model {tmp_path}" in str(caught.value)


def test_nothing_private_is_uploaded_to_a_server_that_shows_it(hub: Hub, tmp_path: Path) -> None:
    hub.keeps_private = False
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="my-lab/model is there and public"):
        upload(tmp_path, find_repository("my-lab/model", private=True), "Step 1")
    assert set(hub.repositories["my-lab/model"].files) == {".gitattributes"}


def test_public_without_an_upload_is_refused(tmp_path: Path) -> None:
    from mone_megatron.commands.export_hf import main

    assert main([str(tmp_path), "--output", str(tmp_path / "x"), "--public"]) == 2
