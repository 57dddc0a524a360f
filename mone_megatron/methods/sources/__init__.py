"""Holds the places where data comes from: ``data.source``. One file each."""

from mone_megatron.methods.registry import Registry
from mone_megatron.methods.source import Source

SOURCES: Registry[Source] = Registry(
    Source, key="data.source", package="mone_megatron.methods.sources"
)
