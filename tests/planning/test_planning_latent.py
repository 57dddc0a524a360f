"""The gradients of latent attention's whole weights are in the predicted time, once a step."""

from __future__ import annotations

from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.communication import _latent_attention
from mone_megatron.planning.prediction import _kind


def test_gradients_of_whole_weights_count_with_the_other_gradients() -> None:
    config = compose(["experiment=deepseek_v2_lite_moe", "parallel.tensor=2", "parallel.expert=2"])
    layout = validate(config, world_size=8, have_transformer_engine=True)
    kinds = {
        item.operation: _kind(item)
        for item in _latent_attention(config, layout, Numerics("cuda", 2))
    }
    assert kinds == {"all-gather": "tensor", "reduce-scatter": "tensor", "all-reduce": "gradient"}
