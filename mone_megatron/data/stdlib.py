"""Makes a corpus of the Python standard library that is running: real text on every machine.

Built once under ``data.cache_dir`` and reused. The folder's name holds the Python version and a
digest of everything the corpus depends on, so another version or setting gets another folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import DataConfig
from mone_megatron.data.files import sha256_file, sync_file
from mone_megatron.data.preprocess import TokenizerSettings, write_corpus
from mone_megatron.data.records import Document
from mone_megatron.os_errors import readable
from mone_megatron.ownership import locked

# Folders that are not the library, or its tests: repetitive, partly not valid source, and absent
# from many installations. What is left is about 12 MB.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
# Files are shuffled so that no package falls whole into one split. Part of the cache key.
_SHUFFLE_SEED = 20240229
_CORPUS_FORMAT = 1
_NAME = "corpus"


def build_stdlib_corpus(config: DataConfig) -> Path:
    """Returns the prefix of the corpus, building it first if this machine has none.

    Safe to call in several processes at once: one builds, the others wait and reuse.

    Raises:
        ConfigError: the library's sources are not installed, or none fits in the limit.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root, config.max_megabytes)
    if not files:
        raise ConfigError(
            f"data.source=stdlib: no Python sources under {root} within data.max_megabytes;"
            " raise it, or use data.source=indexed"
        )
    base = Path(config.cache_dir) / "stdlib"
    version = f"{platform.python_implementation().lower()}{platform.python_version()}"
    folder = base / f"{version}-{_settings_digest(config, root, files)}"
    prefix = folder / _NAME
    # The folder appears by one rename, so it is there whole or not at all.
    if folder.is_dir():
        return prefix
    with locked(base / f"{folder.name}.lock"):
        if not folder.is_dir():
            _build(config, root, files, folder)
    return prefix


def stdlib_files(root: Path, max_megabytes: float) -> list[Path]:
    """Returns the library's non-empty ``.py`` files, relative to ``root``, in corpus order.

    Args:
        root: the standard library's folder.
        max_megabytes: takes files, in order, while they fit in this many MB; 0 for all.
    """
    names: list[str] = []
    # Texts, not paths: the library has hundreds of files, and every start of a run lists them.
    for folder, subfolders, inside in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        prefix = os.path.relpath(folder, root)
        names.extend(
            os.path.normpath(os.path.join(prefix, name)).replace(os.sep, "/")
            for name in inside
            if name.endswith(".py")
        )
    names.sort()
    random.Random(_SHUFFLE_SEED).shuffle(names)
    room = max_megabytes * 1e6
    taken: list[Path] = []
    for name in names:
        size = os.stat(os.path.join(root, name)).st_size
        if size == 0 or (max_megabytes and size > room):
            continue
        room -= size
        taken.append(Path(name))
    return taken


def _settings_digest(config: DataConfig, root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    digest.update(f"{_CORPUS_FORMAT} {_SHUFFLE_SEED} {config.max_megabytes}\n".encode())
    if config.tokenizer:
        tokenizer = Path(config.tokenizer) / "tokenizer.json"
        with readable(f"data.tokenizer={config.tokenizer}"):
            if not tokenizer.is_file():
                raise ConfigError(f"data.tokenizer: {config.tokenizer} holds no tokenizer.json")
            digest.update(sha256_file(tokenizer).encode())
        # Corpora of before have no BOS, whatever the tokenizer's template says.
        digest.update(b"bos auto")
    else:
        digest.update(f"bpe {config.vocab_size}".encode())
    for path in files:
        digest.update(f"\n{path.as_posix()} {(root / path).stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _build(config: DataConfig, root: Path, files: list[Path], folder: Path) -> None:
    # Drafts of builders that were killed: whoever holds the lock is the only builder.
    for stale in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(stale)
    draft = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    draft.mkdir()
    total = sum((root / path).stat().st_size for path in files)
    print(
        f"data.source=stdlib: building a corpus of {total / 1e6:.1f} MB from {root} in {folder}",
        file=sys.stderr,
        flush=True,
    )

    def documents() -> Iterator[Document]:
        for path in files:
            content = (root / path).read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                # A few old modules declare another encoding; empty documents are skipped.
                text = ""
            yield Document(text, len(content))

    if config.tokenizer:
        tokenizer = TokenizerSettings(folder=Path(config.tokenizer))
    else:
        tokenizer = TokenizerSettings(train_vocab_size=config.vocab_size)
    try:
        write_corpus(documents, draft / _NAME, tokenizer, total_bytes=total)
        draft.rename(folder)
        sync_file(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
