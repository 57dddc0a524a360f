"""Counts the bytes of text that each token stands for: the denominator of bits per byte.

Tokens can end inside a character, so text cut at token boundaries cannot simply be decoded and
measured. The tokens' own spelling says it exactly, for the two spellings in use.
"""

from __future__ import annotations

import json
import re

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What SentencePiece writes for a space.
_SPACE = "▁"


def bytes_of_tokens(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int64] | None:
    """Returns how many bytes of UTF-8 text each token id stands for.

    Args:
        tokenizer: of the tokenizers package.
        vocab_size: entries of the result; at least the tokenizer's largest id + 1.

    Returns:
        ``[vocab_size]`` int64: 0 for special tokens and for ids without a token. They add up to the
        bytes of the text as the tokenizer normalises it. None when it spells its tokens in another
        way than byte-level BPE or SentencePiece does.
    """
    settings = json.loads(tokenizer.to_str())
    decoder_types = _types(settings["decoder"])
    byte_level = "ByteLevel" in decoder_types
    spaces = bool(decoder_types & {"Metaspace", "ByteFallback"})
    if not (byte_level or spaces):
        return None
    special = {token["id"] for token in settings["added_tokens"] if token["special"]}
    plain = {token["id"] for token in settings["added_tokens"]}
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in special:
            continue
        if byte_level and index not in plain:
            # One character of the spelling for each byte.
            sizes[index] = len(token)
        elif _BYTE_FALLBACK.fullmatch(token):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace(_SPACE, " ").encode("utf-8"))
    return sizes


def _types(part: object) -> set[str]:
    """Returns every ``type`` in a part of a tokenizer's settings."""
    if isinstance(part, list):
        return set().union(*map(_types, part)) if part else set()
    if not isinstance(part, dict):
        return set()
    own = {part["type"]} if isinstance(part.get("type"), str) else set()
    return own.union(*(_types(value) for value in part.values()))
