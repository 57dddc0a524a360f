"""Reads corpora that were prepared before: Megatron's .bin and .idx files."""

from mone_megatron.methods.source import Source

METHOD = Source(
    name="indexed",
    formula="the corpora that data.paths names",
    source="tools/preprocess_data.py",
    build=None,
)
