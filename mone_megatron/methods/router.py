"""Defines what a router is: the module that sends each token to some of the experts.

It imports no torch, so that names can be checked without.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mone_megatron.methods.registry import imported


@dataclass(frozen=True)
class Router:
    """Describes one router; ``model.router.kind`` names it.

    Attributes:
        name: the router's name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        reference: ``module:Class`` of a subclass of megatron-core's ``TopKRouter``, which is built
            with ``config`` and ``pg_collection`` and returns probabilities and a routing map, each
            ``[tokens, experts]``. Its weight keeps the name and shape of megatron-core's.
        fixed_count: whether each token goes to exactly ``model.experts_per_token`` experts. A
            dispatcher that counts on it (flex) is refused otherwise.
        causal: whether a token's experts depend on no other token.
        reads_batch: whether a token's experts depend on the other tokens of its microbatch. A
            layout that splits them over ranks is refused then.
        settings: the keys of ``model.router`` that its class reads, as attributes of these names.
        stock: whether it is megatron-core's own, which exports can hold.
    """

    name: str
    formula: str
    source: str
    reference: str
    fixed_count: bool = True
    causal: bool = True
    reads_batch: bool = False
    settings: tuple[str, ...] = ()
    stock: bool = False

    @cached_property
    def module(self) -> type:
        """Returns the class itself; importing megatron-core is left until it is asked for."""
        found = imported(self.reference)
        assert isinstance(found, type), f"{self.reference} is no class"
        return found
