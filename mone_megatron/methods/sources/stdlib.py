"""Reads the Python standard library that is running: real text on every machine."""

from mone_megatron.methods.source import Source

METHOD = Source(
    name="stdlib",
    formula="the Python standard library in use",
    source="this machine",
    build="mone_megatron.data.stdlib:build_stdlib_corpus",
)
