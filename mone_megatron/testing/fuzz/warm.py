"""Imports what a tool needs beside what a rank does: in the process that warm ones are forked from.

Each run of the fuzzer is a process of its own, and most would take longer to import transformers
than to train.
"""

import gc

import transformers.generation
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import mone_megatron.hf.checks
import mone_megatron.hf.export
import mone_megatron.hf.importing
import mone_megatron.report.compare
import mone_megatron.testing.warm_imports  # noqa: F401

gc.collect()
gc.freeze()
