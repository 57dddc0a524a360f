"""Holds the methods that a configuration can name, one small file each.

A folder holds the methods of one kind (``scores``, ``activations``, ``rules``, ``losses``), and a
file of it defines ``METHOD``: its name, what it computes and what it needs. Nothing else lists
names: the configuration, the kernels, the planner, the tools and the Hugging Face side read the
registries in these folders' ``__init__`` files. An installed package adds methods of its own by the
entry point ``mone_megatron.methods`` (docs/extending.md).

Importing a registry imports no torch, so that a configuration is refused before torch is there.
"""
