"""Holds the hooks that a configuration can name: ``train.hooks``. One file each."""

from mone_megatron.methods.hook import HookMethod
from mone_megatron.methods.registry import Registry

HOOKS: Registry[HookMethod] = Registry(
    HookMethod, key="train.hooks", package="mone_megatron.methods.hooks"
)
