"""Turns a configuration into megatron-core model chunks."""
