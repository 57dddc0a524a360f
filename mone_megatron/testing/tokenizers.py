"""Makes tokenizers for tests from other ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, processors

BOS = "<s>"


def with_bos(source: Path, folder: Path, *, template: str = "<s> $A") -> int:
    """Writes a tokenizer that has a BOS into ``folder``.

    Args:
        source: folder of a tokenizer without one.
        folder: need not be there.
        template: what the tokenizer makes of a text ``$A``; empty for no template.

    Returns:
        The BOS's id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([BOS])
    bos = tokenizer.token_to_id(BOS)
    assert bos is not None
    eos = "<|endoftext|>"
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(BOS, bos), (eos, tokenizer.token_to_id(eos))],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"bos_token": BOS}), encoding="utf-8")
    return bos
