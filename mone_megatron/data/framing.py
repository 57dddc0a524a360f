"""Says how a document becomes tokens: the special tokens around its own, and what has no text.

Preprocessing decides it once. It is kept beside the corpus, in every checkpoint and export, and
everything that turns text into tokens for a model follows it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tokenizers import Tokenizer, processors

from mone_megatron.data.lines import has_text
from mone_megatron.data.tokenizer import LoadedTokenizer, end_of_document, special_token

BosChoice = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Framing:
    """Describes the special tokens that a model saw around each document's own in training.

    Attributes:
        opening: ids before each document: the begin-of-sequence token, of few tokenizers several
            tokens, or none.
        eod: id after each document; None where a tokenizer names none.
        parse_special_tokens: special tokens spelled out in a document become their ids; otherwise
            they are text, so that no document can end itself.
        assumed: why this is assumed and not known; empty when it is known.
    """

    opening: tuple[int, ...]
    eod: int | None
    parse_special_tokens: bool = False
    assumed: str = ""

    @property
    def end(self) -> int:
        """Returns the id after each document.

        Raises:
            ValueError: the tokenizer names none.
        """
        if self.eod is None:
            raise ValueError("its tokenizer names no eos_token; add it to tokenizer_config.json")
        return self.eod

    @property
    def context(self) -> tuple[int, ...]:
        """Returns what the first token of a text follows: the opening, else the end of another."""
        return self.opening or (self.end,)

    def describe(self, tokenizer: Tokenizer | None) -> str:
        """Returns in words how documents begin; tokens by their ids without a tokenizer."""
        if self.opening:
            tokens = " ".join(
                str(token if tokenizer is None else tokenizer.id_to_token(token))
                for token in self.opening
            )
            how = f"each text begins with {tokens}"
        else:
            how = "texts begin without BOS"
        return f"{how} ({self.assumed})" if self.assumed else how

    def known_by(self, tokenizer: Tokenizer) -> Framing:
        """Returns it as known where nothing else could be: no BOS, and a tokenizer without one."""
        certain = not self.opening and not template_opening(tokenizer)
        return replace(self, assumed="") if certain else self

    def as_facts(self) -> dict[str, Any]:
        """Returns what is kept of it in JSON or YAML; :func:`framing_of` reads it."""
        facts = asdict(self)
        del facts["assumed"]
        return facts | {"opening": list(self.opening)}


class DocumentEncoder:
    """Turns documents into tokens: the only place where that is done."""

    def __init__(self, tokenizer: Tokenizer, framing: Framing) -> None:
        """Takes a copy of ``tokenizer``, which stays as it is."""
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not framing.parse_special_tokens
        self._opening, self._end = framing.opening, framing.end

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a document with what stands around them; none when it has no text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids if has_text(text) else []
        return [*self._opening, *ids, self._end] if ids else []


def template_opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the tokenizer's own template puts before a text."""
    return _template(tokenizer)[0]


def _template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what the tokenizer's own template puts before and after a text."""
    whole = tokenizer.encode("a", add_special_tokens=True)
    marked = list(
        itertools.compress(
            zip(whole.ids, whole.special_tokens_mask, strict=True),
            # Not what pads it.
            whole.attention_mask,
        )
    )
    before = tuple(token for token, _ in itertools.takewhile(lambda pair: pair[1], marked))
    after = tuple(token for token, added in marked[len(before) :] if added)
    return before, after


def choose_framing(
    loaded: LoadedTokenizer,
    *,
    bos: BosChoice,
    eod_token: str | None = None,
    parse_special_tokens: bool = False,
) -> Framing:
    """Decides how documents become tokens.

    Args:
        loaded: the tokenizer.
        bos: ``auto`` begins a document as the tokenizer's own template does; ``always`` with its
            ``bos_token`` whatever the template does; ``never`` with nothing.
        eod_token: ends a document; see :func:`end_of_document`.
        parse_special_tokens: see :class:`Framing`.

    Raises:
        ValueError: ``always`` for a tokenizer that names no ``bos_token``, or an unknown choice;
            no token to end a document with.
    """
    eod = end_of_document(loaded, eod_token)
    if bos == "never":
        opening: tuple[int, ...] = ()
    elif bos == "auto":
        opening = template_opening(loaded.tokenizer)
    elif bos == "always":
        opening = template_opening(loaded.tokenizer) or _named_bos(loaded)
    else:
        raise ValueError(f"--bos: {bos!r} is not auto, always or never")
    return Framing(opening, eod, parse_special_tokens)


def _named_bos(loaded: LoadedTokenizer) -> tuple[int, ...]:
    name = special_token(loaded.folder, "bos_token")
    if name is None:
        raise ValueError(
            f"--bos always: {loaded.folder} names no bos_token; add it to tokenizer_config.json"
        )
    bos = loaded.tokenizer.token_to_id(name)
    if bos is None:
        raise ValueError(f"--bos always: {loaded.folder} names {name!r} and has no such token")
    return (bos,)


def framing_of(facts: Mapping[str, Any] | None, *, eod: int | None, where: str) -> Framing:
    """Returns the framing that :meth:`Framing.as_facts` gave.

    Args:
        facts: None for what was made before it was kept: then no document had a BOS.
        eod: the token that ends a document where the facts do not say.
        where: the place of the facts, for messages.

    Raises:
        ValueError: when the facts are damaged.
    """
    if facts is None:
        return Framing((), eod, assumed="made before this was recorded, when none had one")
    try:
        opening = tuple(facts["opening"])
        end, parse = facts["eod"], facts["parse_special_tokens"]
        if not all(type(token) is int for token in opening):
            raise TypeError("opening holds something else than ids")
        if not isinstance(parse, bool) or not (end is None or type(end) is int):
            raise TypeError("eod is no id, or parse_special_tokens neither true nor false")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is damaged (how documents become tokens: {error!r})") from None
    return Framing(opening, end, parse)


def begin_texts_with(tokenizer: Tokenizer, opening: tuple[int, ...]) -> bool:
    """Makes the tokenizer's own template begin every text with ``opening``, and add nothing else.

    Whoever asks the tokenizer itself for a text with its special tokens, here or in another
    program, then gets what the model was trained on.

    Returns:
        Whether that changed anything.
    """
    names = [str(tokenizer.id_to_token(token)) for token in opening]
    template = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", "$B:1"],
        special_tokens=list(dict(zip(names, opening, strict=True)).items()),
    )
    if _template(tokenizer) == (opening, ()):
        return False
    # What a template does not decide, such as offsets of a byte-level BPE, stays.
    kept = [part for part in _parts(tokenizer) if part["type"] in _WITHOUT_TOKENS]
    tokenizer.post_processor = processors.Sequence(
        [*(_WITHOUT_TOKENS[part["type"]](part) for part in kept), template]
    )
    return True


_WITHOUT_TOKENS = {
    "ByteLevel": lambda part: processors.ByteLevel(
        add_prefix_space=part["add_prefix_space"],
        trim_offsets=part["trim_offsets"],
        use_regex=part["use_regex"],
    )
}


def _parts(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the settings of the tokenizer's post-processors, one after the other."""
    settings = json.loads(tokenizer.to_str())["post_processor"]
    if settings is None:
        return []
    parts: list[dict[str, Any]] = settings.get("processors", [settings])
    return parts
