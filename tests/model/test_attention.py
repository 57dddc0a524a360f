from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.model.attention import SDPAttention

S, B, N, D = 9, 2, 4, 8


def _config(groups: int, dropout: float = 0.0) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=N * D,
        num_attention_heads=N,
        num_query_groups=groups,
        attention_dropout=dropout,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
        cuda_graph_scope=[],
    )


def _inputs(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(groups)
    return [
        torch.randn(S, B, heads, D, generator=generator).requires_grad_()
        for heads in (N, groups, groups)
    ]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_equals_megatron_cores_attention(groups: int, softmax_scale: float | None) -> None:
    config = _config(groups)
    arguments = (1, AttnMaskType.causal, "self")
    ours = SDPAttention(config, *arguments, softmax_scale=softmax_scale)
    theirs = DotProductAttention(config, *arguments, softmax_scale=softmax_scale)
    masked = torch.ones(S, S, dtype=torch.bool).triu(1).view(1, 1, S, S)
    grad = torch.randn(S, B, N * D, generator=torch.Generator().manual_seed(0))
    inputs = _inputs(groups)
    results = []
    for attention in (ours, theirs):
        output = attention(*inputs, masked)
        assert output.shape == (S, B, N * D)
        results.append((output, *torch.autograd.grad(output, inputs, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_dropout_acts_in_training_only() -> None:
    attention = SDPAttention(_config(2, dropout=0.5), 1, AttnMaskType.causal, "self")
    plain = SDPAttention(_config(2), 1, AttnMaskType.causal, "self")
    inputs = _inputs(2)
    assert not torch.allclose(attention(*inputs), plain(*inputs))
    attention.eval()
    assert torch.equal(attention(*inputs), plain(*inputs))
    off = SDPAttention(
        _config(2, dropout=0.5), 1, AttnMaskType.causal, "self", attention_dropout=0.0
    )
    assert torch.equal(off(*inputs), plain(*inputs))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="SDPAttention is causal; the layer asks for"):
        SDPAttention(_config(2), 1, AttnMaskType.padding, "self")
    config = _config(2)
    config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"parallel\.context: .*Transformer Engine.*context=1"):
        SDPAttention(config, 1, AttnMaskType.causal, "self")
    attention = SDPAttention(_config(2), 1, AttnMaskType.causal, "self")
    with pytest.raises(AssertionError):
        attention(*_inputs(2), packed_seq_params=object())
