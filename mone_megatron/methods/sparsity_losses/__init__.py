"""Holds losses over the hidden values of routed experts: ``model.sparsity_loss``; a file each."""

from mone_megatron.methods.registry import Registry
from mone_megatron.methods.sparsity_loss import SparsityLoss

SPARSITY_LOSSES: Registry[SparsityLoss] = Registry(
    SparsityLoss, key="model.sparsity_loss", package="mone_megatron.methods.sparsity_losses"
)
