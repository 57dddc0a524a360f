"""Keeps folders of checkpoints that are whole, verified before use, and safe to read.

What the files of a checkpoint contain is none of this package's business: it needs no process
group and no megatron-core.
"""

from mone_megatron.checkpoint.digests import FileDigest, digest_file, digest_files
from mone_megatron.checkpoint.errors import (
    CheckpointWriteError,
    DamagedCheckpointError,
    NoUsableCheckpointError,
    UnsafePickleError,
    write_error,
)
from mone_megatron.checkpoint.facts import check_facts
from mone_megatron.checkpoint.reader import Checkpoint, open_checkpoint, read_checkpoint
from mone_megatron.checkpoint.safe_unpickle import restricted_pickle, safe_torch_load
from mone_megatron.checkpoint.store import CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "FileDigest",
    "NoUsableCheckpointError",
    "UnsafePickleError",
    "check_facts",
    "digest_file",
    "digest_files",
    "open_checkpoint",
    "read_checkpoint",
    "restricted_pickle",
    "safe_torch_load",
    "write_error",
]
