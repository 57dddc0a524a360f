"""Holds tokenizing, indexed datasets and the loader; `prepare` and `loader` are the ways in.

Nothing is re-exported: `datasets` imports megatron-core, which the other modules must not.
"""
