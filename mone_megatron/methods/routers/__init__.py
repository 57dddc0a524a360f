"""Holds the routers that send tokens to experts: ``model.router.kind``. One file each."""

from mone_megatron.methods.registry import Registry
from mone_megatron.methods.router import Router

ROUTERS: Registry[Router] = Registry(
    Router, key="model.router.kind", package="mone_megatron.methods.routers"
)
