"""Defines ``manifest.json``: what a checkpoint consists of, written after all it describes.

The text holds the SHA-256 of its own content and has one spelling only, so any changed byte of it
is noticed. That guards against damage, not against someone who writes a new manifest: see
:mod:`mone_megatron.checkpoint.safe_unpickle` for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mone_megatron.checkpoint.digests import MANIFEST_NAME, FileDigest
from mone_megatron.checkpoint.errors import DamagedCheckpointError

FORMAT = 1
# Some hundred thousand files; a larger "manifest" is not read into memory.
_MAX_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """Holds the facts of one checkpoint."""

    # Version of this description.
    format: int
    # Optimizer steps done.
    step: int
    # 1, 2, ... in the order of saving: tells the newest when steps were done twice.
    serial: int
    # UTC, ISO 8601.
    saved_at: str
    # What the run says about itself; plain JSON values.
    facts: Mapping[str, Any]
    # Every file but the manifest, by name relative to the folder, "/" between parts.
    files: Mapping[str, FileDigest]


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the one spelling of a manifest: JSON in ASCII."""
    body = asdict(manifest)
    content = {"manifest": body, "sha256": hashlib.sha256(_spell(body)).hexdigest()}
    return _spell(content) + b"\n"


def decode_manifest(text: bytes) -> Manifest:
    """Returns the manifest that :func:`encode_manifest` spelled.

    Raises:
        ValueError: any byte is not as it was encoded; the message says what is wrong.
    """
    try:
        content = json.loads(text.decode("ascii"))
    # Nesting deep enough ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})" if text else "empty") from error
    if not isinstance(content, dict) or set(content) != {"manifest", "sha256"}:
        raise ValueError("not a manifest")
    body = content["manifest"]
    try:
        spelled, whole = _spell(body), _spell(content) + b"\n"
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a manifest ({error})") from error
    if whole != text or content["sha256"] != hashlib.sha256(spelled).hexdigest():
        raise ValueError("it is not as it was written (its own SHA-256 does not match)")
    return _to_manifest(body)


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Reads a checkpoint's manifest; returns it and the SHA-256 of the file as hex.

    Raises:
        DamagedCheckpointError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            text = stream.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return decode_manifest(text), hashlib.sha256(text).hexdigest()
    except FileNotFoundError as error:
        problem = f"{MANIFEST_NAME}: missing" if folder.is_dir() else f"{folder.name}: missing"
        raise DamagedCheckpointError(folder, [problem]) from error
    except NotADirectoryError as error:
        raise DamagedCheckpointError(folder, [f"{folder.name}: not a folder"]) from error
    except OSError as error:
        problem = f"{MANIFEST_NAME}: cannot be read ({error.strerror})"
        raise DamagedCheckpointError(folder, [problem]) from error
    except ValueError as error:
        raise DamagedCheckpointError(folder, [f"{MANIFEST_NAME}: {error}"]) from error


def _spell(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode("ascii")


def _to_manifest(body: Any) -> Manifest:
    if not isinstance(body, dict):
        raise ValueError("not a manifest")
    if body.get("format") != FORMAT:
        raise ValueError(f"its format is {body.get('format')!r}, this version reads {FORMAT}")
    kinds = {"step": int, "serial": int, "saved_at": str}
    kinds |= {"facts": dict, "files": dict, "format": int}
    if set(body) != set(kinds) or any(type(body[k]) is not kind for k, kind in kinds.items()):
        raise ValueError("its fields are not those of a manifest")
    files: dict[str, FileDigest] = {}
    for name, values in body["files"].items():
        # Names are joined to the folder's: they must not lead out of it.
        if not is_inside(name) or name == MANIFEST_NAME:
            raise ValueError(f"it names the file {name!r}, which is not inside the checkpoint")
        if (
            not isinstance(values, dict)
            or set(values) != {"size", "sha256"}
            or type(values["size"]) is not int
            or type(values["sha256"]) is not str
            or not _SHA256.fullmatch(values["sha256"])
        ):
            raise ValueError(f"its entry of {name} is not a size and a SHA-256")
        files[name] = FileDigest(**values)
    return Manifest(**{**body, "files": files})


def is_inside(name: str) -> bool:
    """Returns whether a relative name, joined to a folder, stays inside that folder."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)
