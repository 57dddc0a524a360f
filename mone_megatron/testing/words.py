"""Writes a text to train on that is the same on every machine and Python."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random


def write_words(path: Path) -> Path:
    """Writes 400 documents of seeded words with a skewed distribution as JSON lines.

    Args:
        path: the file; its objects have one key, ``text``.

    Returns:
        The same path.
    """
    random = Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(random.choices(letters, k=random.randint(1, 9))) for _ in range(600)]
    weights = [1 / (rank + 2) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(400):
            document = " ".join(random.choices(words, weights, k=300))
            lines.write(json.dumps({"text": document}) + "\n")
    return path
