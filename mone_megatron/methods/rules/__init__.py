"""Holds the rules that say which neurons a token keeps: ``mone.rule``. One file each."""

from mone_megatron.methods.registry import Registry
from mone_megatron.methods.rule import Rule

RULES: Registry[Rule] = Registry(Rule, key="mone.rule", package="mone_megatron.methods.rules")
