"""Defines the layer of experts of a single neuron that are found by product keys.

What it computes is defined in :mod:`mone_megatron.kernels.product_keys`.

Shape suffixes: T tokens, H hidden size, P heads, K experts of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mone_megatron.kernels import product_keys
from mone_megatron.kernels.product_keys import ProductKeySizes
from mone_megatron.methods.activations import up_function
from mone_megatron.mone.megatron_settings import GATED_MLP, refuse_unread


class ProductKeyExperts(MegatronModule):
    """Is a layer's MLP of single-neuron experts; every rank has all of them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        *,
        sizes: ProductKeySizes,
        **more: Any,
    ) -> None:
        """Allocates the layer; :mod:`mone_megatron.model.initialize` fills it.

        Args:
            config: megatron-core's configuration of the model.
            submodules: none; megatron-core gives a module its own.
            sizes: of the layer.
            more: what megatron-core gives an MLP beside them; not used.

        Raises:
            ValueError: for settings that it does not read.
        """
        super().__init__(config=config)
        refuse_unread("ProductKeyExperts", config, GATED_MLP)
        assert up_function(config.activation_func) is None, "checked by config.validate"
        self.sizes = sizes
        for name, shape in sizes.weights(config.hidden_size).items():
            self.register_parameter(name, self._parameter(*shape))

    def _parameter(self, *shape: int) -> nn.Parameter:
        device = torch.device("cpu")
        if not self.config.use_cpu_initialization:
            device = torch.device("cuda", torch.cuda.current_device())
        return nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        return dict(self.named_parameters(recurse=False))

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """Maps ``[s, b, h]`` to ``[s, b, h]``, and no bias."""
        output_TH = product_keys.product_key_experts(
            hidden_states.flatten(0, -2), self._weights, self.sizes, self.config.activation_func
        )
        return output_TH.view_as(hidden_states), None

    def choose(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each head's k experts: scores, fp32, and numbers, each ``[T, P, K]``."""
        return product_keys.choose(tokens_TH, self._weights, self.sizes)
