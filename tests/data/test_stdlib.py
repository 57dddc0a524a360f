from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mone_megatron.config.schema import DataConfig
from mone_megatron.data.indexed import bin_path, read_index
from mone_megatron.data.sidecar import tokenizer_path
from mone_megatron.data.stdlib import build_stdlib_corpus, stdlib_files

_BUILD = """
import sys
from mone_megatron.config.schema import DataConfig
from mone_megatron.data.stdlib import build_stdlib_corpus
print(build_stdlib_corpus(DataConfig(cache_dir=sys.argv[1], max_megabytes=0.3, vocab_size=300)))
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""


def test_two_processes_build_once_and_a_third_reuses(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BUILD, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sorted("building" in errors for _, errors in outputs) == [False, True]
    prefix = Path(outputs[0][0].strip())
    written = bin_path(prefix).stat().st_mtime_ns
    config = DataConfig(cache_dir=str(tmp_path), max_megabytes=0.3, vocab_size=300)
    assert build_stdlib_corpus(config) == prefix
    assert bin_path(prefix).stat().st_mtime_ns == written
    assert [path.name for path in prefix.parent.parent.glob("*.building-*")] == []

    # The content is the library's sources, in the order promised.
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root, 0.3)
    index = read_index(prefix)
    tokens = np.fromfile(bin_path(prefix), dtype=index.dtype)
    first = tokens[: index.lengths[0]].tolist()
    tokenizer = Tokenizer.from_file(str(tokenizer_path(prefix) / "tokenizer.json"))
    assert tokenizer.decode(first[:-1]) == (root / files[0]).read_text(encoding="utf-8")


def test_files_respect_the_limit_and_spread_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    everything = stdlib_files(root, 0)
    assert everything == stdlib_files(root, 0)
    assert sum((root / path).stat().st_size for path in everything) > 8e6
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in everything)
    limited = stdlib_files(root, 0.5)
    size = sum((root / path).stat().st_size for path in limited)
    assert 0.4e6 < size <= 0.5e6
    package = [
        place for place, path in enumerate(everything) if path.parts[0] in ("email", "encodings")
    ]
    half = len(everything) // 2
    assert any(place < half for place in package)
    assert any(place >= half for place in package)


def test_settings_have_folders_of_their_own(tmp_path: Path) -> None:
    def build(vocab_size: int) -> Path:
        config = DataConfig(cache_dir=str(tmp_path), max_megabytes=0.1, vocab_size=vocab_size)
        return build_stdlib_corpus(config)

    assert build(280).parent != build(290).parent


def test_drafts_of_killed_builders_are_removed(tmp_path: Path) -> None:
    config = DataConfig(cache_dir=str(tmp_path), max_megabytes=0.1, vocab_size=280)
    folder = build_stdlib_corpus(config).parent
    renamed = folder.with_name(f"{folder.name}.building-1")
    folder.rename(renamed)
    assert build_stdlib_corpus(config).parent == folder
    assert not renamed.exists()
