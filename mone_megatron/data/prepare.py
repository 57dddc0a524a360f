"""Checks the data of a run, or builds it, before any process group or device is touched.

Every process calls :func:`prepare_data`, at the same time: it reads headers, indices and digests,
not the tokens, and what has to be built or scanned is done by one process under a file lock.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config, DataConfig
from mone_megatron.data.files import quick_digest, sha256_file
from mone_megatron.data.framing import Framing, framing_of, template_opening
from mone_megatron.data.indexed import CorpusIndex, bin_path, idx_path, read_index
from mone_megatron.data.sidecar import Sidecar, read_sidecar, sidecar_path, tokenizer_path
from mone_megatron.data.tokenizer import LoadedTokenizer, end_of_document, load_tokenizer
from mone_megatron.methods.sources import SOURCES
from mone_megatron.os_errors import explained
from mone_megatron.ownership import locked
from mone_megatron.whole_files import json_text, write_whole

_DOCUMENTS_LOOKED_AT = 1000


@dataclass(frozen=True)
class PreparedData:
    """Describes data that was checked: what the model and the datasets need to know of it."""

    # Prefixes of the .bin/.idx pairs.
    prefixes: tuple[str, ...]
    # Sampling weights, one per prefix; None when there is one prefix.
    weights: tuple[float, ...] | None
    # Entries of the vocabulary, unpadded: model.vocab_size, or the tokenizer's size if that is 0.
    vocab_size: int
    # The special tokens around each document.
    framing: Framing
    # How documents begin, in words.
    beginning: str
    # Folder of the Hugging Face tokenizer.
    tokenizer_dir: str
    # Tokens of all prefixes, all splits.
    tokens: int
    # SHA-256 over the contents, their order, the weights and the split. Equal on every machine
    # that holds the same data, wherever it lies.
    fingerprint: str

    @property
    def eod(self) -> int:
        """Returns the id of the token that ends each document."""
        return self.framing.end


@dataclass(frozen=True)
class _Corpus:
    """Is one checked prefix."""

    key: str
    index: CorpusIndex
    sidecar: Sidecar | None
    bin_digest: str
    idx_digest: str


def prepare_data(config: Config) -> PreparedData:
    """Checks ``config.data`` (and builds the corpus, if the source is one that does).

    Args:
        config: one that passed :func:`mone_megatron.config.validate.validate`.

    Raises:
        ConfigError: the data is missing, damaged, too short, or does not fit the vocabulary. One
            line that names the configuration key and the fix.
    """
    data = config.data
    source = SOURCES[data.source]
    if not source.reads_paths:
        with _cache_refusals(data):
            prefix = source.prefix(data)
        fix = f"delete {prefix.parent} to rebuild it"
        corpora = [_open(f"data.source={source.name}", prefix, fix)]
    else:
        _check_paths(data.paths)
        fix = "make it again with tools/preprocess_data.py"
        corpora = [
            _open(f"data.paths[{position}]", Path(path), fix)
            for position, path in enumerate(data.paths)
        ]
    for corpus in corpora:
        _check_length(config, corpus)
    tokenizer = _resolve_tokenizer(data, corpora)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    for corpus in corpora:
        _check_tokens(config, corpus, vocab_size)
    framing = _common_framing(corpora, tokenizer)
    if framing.end >= vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the end-of-document token is {framing.end};"
            f" set it to 0 or to at least {tokenizer.vocab_size}"
        )
    weights = _weights(data, corpora)
    return PreparedData(
        prefixes=tuple(str(corpus.index.prefix) for corpus in corpora),
        weights=weights,
        vocab_size=vocab_size,
        framing=framing,
        beginning=framing.describe(tokenizer.tokenizer),
        tokenizer_dir=str(tokenizer.folder),
        tokens=sum(corpus.index.tokens for corpus in corpora),
        fingerprint=_fingerprint(corpora, weights, data.split),
    )


def check_cache(data: DataConfig) -> None:
    """Checks that ``data.cache_dir`` can be written, for the process that writes indices there.

    Raises:
        ConfigError: when it cannot, in one line.
    """
    folder = Path(data.cache_dir) / "indices"
    with _cache_refusals(data):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")


@contextmanager
def _cache_refusals(data: DataConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={data.cache_dir}: cannot be used ({explained(error)});"
            " use a folder that can be written"
        ) from error


def _check_paths(paths: Sequence[str]) -> None:
    assert paths
    for position, path in enumerate(paths):
        if path in paths[:position]:
            raise ConfigError(f"data.paths[{position}]: {path} is named twice; weight it instead")
        if Path(path).suffix in (".bin", ".idx") and not bin_path(Path(path)).exists():
            raise ConfigError(
                f"data.paths[{position}]: give the prefix without its extension,"
                f" {Path(path).with_suffix('')}"
            )


def _open(key: str, prefix: Path, fix: str) -> _Corpus:
    try:
        index = read_index(prefix)
        sidecar = read_sidecar(prefix)
        bin_digest, idx_digest = quick_digest(bin_path(prefix)), sha256_file(idx_path(prefix))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; {fix}") from error
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot be read ({explained(error)}); make it readable, or name another"
        ) from error
    corpus = _Corpus(key, index, sidecar, bin_digest=bin_digest, idx_digest=idx_digest)
    if sidecar is None:
        return corpus
    for path, digest, expected in (
        (bin_path(prefix), corpus.bin_digest, sidecar.bin_quick_digest),
        (idx_path(prefix), corpus.idx_digest, sidecar.idx_sha256),
    ):
        if digest != expected:
            raise ConfigError(
                f"{key}: {path} is not the file {sidecar_path(prefix).name} was written for; {fix}"
            )
    return corpus


def _check_length(config: Config, corpus: _Corpus) -> None:
    """Checks that each split in use fills one sequence (and the label after its last token)."""
    needed = config.train.seq_length + 1
    train, valid, _ = corpus.index.split_tokens(config.data.split)
    if train < needed:
        raise ConfigError(
            f"{corpus.key}: the training split of {corpus.index.prefix} has {train} tokens, fewer"
            f" than train.seq_length + 1 = {needed}; shorten train.seq_length or add data"
        )
    if config.train.eval_interval > 0 and valid < needed:
        raise ConfigError(
            f"data.split: the validation split of {corpus.index.prefix} has {valid} tokens, fewer"
            f" than train.seq_length + 1 = {needed}; enlarge it or set train.eval_interval=0"
        )


def _resolve_tokenizer(data: DataConfig, corpora: Sequence[_Corpus]) -> LoadedTokenizer:
    if data.tokenizer:
        key, folder = "data.tokenizer", Path(data.tokenizer)
    else:
        key, folder = corpora[0].key, _tokenizer_beside(corpora[0])
    try:
        tokenizer = load_tokenizer(folder)
    except OSError as error:
        raise ConfigError(
            f"{key}: its tokenizer cannot be read ({explained(error)}); make it readable, or set"
            " data.tokenizer to another"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; set data.tokenizer to a tokenizer folder") from error
    for corpus in corpora:
        if corpus.sidecar is not None and corpus.sidecar.tokenizer_sha256 != tokenizer.sha256:
            raise ConfigError(
                f"{corpus.key}: its tokens were made by another tokenizer than {folder};"
                " set data.tokenizer to theirs, or tokenize all paths with one"
            )
    return tokenizer


def _tokenizer_beside(corpus: _Corpus) -> Path:
    prefix = corpus.index.prefix
    if corpus.sidecar is not None:
        return prefix.parent / corpus.sidecar.tokenizer
    for folder in (tokenizer_path(prefix), prefix.parent):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise ConfigError(
        f"{corpus.key}: no tokenizer beside {prefix}; set data.tokenizer to a tokenizer folder"
    )


def _check_tokens(config: Config, corpus: _Corpus, vocab_size: int) -> None:
    if corpus.sidecar is not None:
        largest = corpus.sidecar.max_token
    else:
        with _cache_refusals(config.data):
            largest = _scanned_max_token(corpus, Path(config.data.cache_dir))
    if largest < 0:
        raise ConfigError(f"{corpus.key}: {bin_path(corpus.index.prefix)} holds negative token ids")
    if largest < vocab_size:
        return
    if config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {corpus.index.prefix} holds token {largest};"
            f" set it to 0 or to at least {largest + 1}"
        )
    raise ConfigError(
        f"{corpus.key}: {bin_path(corpus.index.prefix)} holds token {largest}, past the"
        f" {vocab_size} entries of its tokenizer; set data.tokenizer to the one that made it"
    )


def _scanned_max_token(corpus: _Corpus, cache_dir: Path) -> int:
    """Returns the largest token of a corpus without a sidecar: read once, then remembered."""
    identity = f"{corpus.idx_digest} {corpus.bin_digest}"
    folder = cache_dir / "scans"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    path = folder / f"{name}.json"
    with locked(folder / f"{name}.lock"):
        if path.is_file():
            return int(json.loads(path.read_text(encoding="utf-8"))["max_token"])
        largest = corpus.index.max_token()
        write_whole(path, json_text({"max_token": largest}, indent=None), durable=True)
    return largest


def _common_eod(corpora: Sequence[_Corpus], tokenizer: LoadedTokenizer) -> int:
    # A corpus may have been made with --eod-token, which the tokenizer folder does not record.
    eods = {corpus.sidecar.eod for corpus in corpora if corpus.sidecar is not None}
    if any(corpus.sidecar is None for corpus in corpora):
        try:
            eods.add(end_of_document(tokenizer))
        except ValueError as error:
            raise ConfigError(
                f"data.tokenizer: {error}; add eos_token to its tokenizer_config.json"
            ) from error
    if len(eods) > 1:
        raise ConfigError(
            f"data.paths: documents end with different tokens {sorted(eods)};"
            " tokenize all paths with one --eod-token"
        )
    return eods.pop()


def _common_framing(corpora: Sequence[_Corpus], tokenizer: LoadedTokenizer) -> Framing:
    eod = _common_eod(corpora, tokenizer)
    framings = [_framing(corpus, tokenizer, eod) for corpus in corpora]
    if len({framing.opening for framing in framings}) > 1:
        how = "; ".join(
            f"{corpus.key}: {framing.describe(tokenizer.tokenizer)}"
            for corpus, framing in zip(corpora, framings, strict=True)
        )
        raise ConfigError(
            f"data.paths: documents begin differently ({how}); tokenize all paths with one --bos"
        )
    # What is known of one corpus counts for all, which are alike.
    return min(framings, key=lambda framing: bool(framing.assumed))


def _framing(corpus: _Corpus, tokenizer: LoadedTokenizer, eod: int) -> Framing:
    if corpus.sidecar is not None:
        where = str(sidecar_path(corpus.index.prefix))
        try:
            framing = framing_of(corpus.sidecar.framing, eod=eod, where=where)
        except ValueError as error:
            raise ConfigError(f"{corpus.key}: {error}") from error
        return framing.known_by(tokenizer.tokenizer)
    # Another tool's corpus: its first documents show it.
    opening = template_opening(tokenizer.tokenizer)
    starts = corpus.index.first_documents(_DOCUMENTS_LOOKED_AT, len(opening))
    begins = bool(opening) and all(start == opening for start in starts)
    assumed = f"as its first {len(starts)} documents do" if opening else ""
    return Framing(opening if begins else (), eod, assumed=assumed)


def _weights(data: DataConfig, corpora: Sequence[_Corpus]) -> tuple[float, ...] | None:
    if len(corpora) == 1:
        return None
    weights = list(data.weights) or [float(corpus.index.tokens) for corpus in corpora]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _fingerprint(
    corpora: Sequence[_Corpus],
    weights: tuple[float, ...] | None,
    split: tuple[float, float, float],
) -> str:
    facts = {
        "corpora": [
            {
                "bin_bytes": bin_path(corpus.index.prefix).stat().st_size,
                "bin": corpus.bin_digest,
                "bin_sha256": corpus.sidecar.bin_sha256 if corpus.sidecar else "",
                "idx": corpus.idx_digest,
            }
            for corpus in corpora
        ],
        "weights": None if weights is None else [weight.hex() for weight in weights],
        "split": [float(share).hex() for share in split],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
