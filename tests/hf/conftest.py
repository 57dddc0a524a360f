from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from hf_models import VOCABULARY

from mone_megatron.data.stdlib import stdlib_files
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of a little of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [(root / path).read_text("utf-8", "ignore") for path in stdlib_files(root, 0.1)]
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder)
    return folder
