"""Holds the losses over the use of neurons: ``mone.balance.kind``. One file each."""

from mone_megatron.methods.loss import NeuronLoss
from mone_megatron.methods.registry import Registry

LOSSES: Registry[NeuronLoss] = Registry(
    NeuronLoss, key="mone.balance.kind", package="mone_megatron.methods.losses"
)
