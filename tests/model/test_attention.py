from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.config.load import compose
from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.data.apart import document_numbers, places_in_documents
from mone_megatron.model.attention import SDPAttention, context_positions, is_windowed
from mone_megatron.model.builder import build_gpt
from mone_megatron.model.transformer import transformer_config
from mone_megatron.mone.layer import MicrobatchSources
from mone_megatron.parallel.groups import open_groups
from mone_megatron.parallel.megatron_compat.context_parts import part_of_context_rank
from mone_megatron.testing.processes import Processes

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
    for attention, mask in ((ours, None), (theirs, masked)):
        output = attention(*inputs, mask)
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
    config.window_size = (3, 3)
    with pytest.raises(ValueError, match=r"causal; window_size=\(3, 3\) is not \(N, 0\)"):
        SDPAttention(config, 1, AttnMaskType.causal, "self")
    config = _config(2)
    config.softmax_type = "odd"
    with pytest.raises(ValueError, match="does not compute softmax_type='odd'"):
        SDPAttention(config, 1, AttnMaskType.causal, "self")
    attention = SDPAttention(_config(2), 1, AttnMaskType.causal, "self")
    with pytest.raises(AssertionError):
        attention(*_inputs(2), packed_seq_params=object())


# Windows, documents and sinks ----------

# Two samples of packed documents: one with a document of one token, one whose last is cut off.
ENDS = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 1, 0, 0]])
DOCUMENTS = document_numbers(ENDS, end_of_text=1)


def _by_definition(
    inputs: list[Tensor], *, window: int | None, documents: Tensor | None, sink_N: Tensor | None
) -> Tensor:
    """Attention written out: scores, what is seen, a softmax with one more logit."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    key, value = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * D**-0.5
    for q in range(S):
        for k in range(S):
            for b in range(B):
                hidden = k > q or (window is not None and q - k > window)
                if hidden or (documents is not None and documents[b, q] != documents[b, k]):
                    scores[b, :, q, k] = -torch.inf
    if sink_N is not None:
        scores = torch.cat([scores, sink_N.view(1, N, 1, 1).expand(B, N, S, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :S]
    return (weights @ value).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("sink", ["vanilla", "off-by-one", "learnable"])
@pytest.mark.parametrize(("window", "apart"), [(None, False), (0, False), (3, True), (None, True)])
def test_windows_documents_and_sinks_are_those_of_the_definition(
    groups: int, sink: str, window: int | None, apart: bool
) -> None:
    config = _config(groups)
    config.softmax_type = sink
    config.window_size = None if window is None else (window, 0)
    config.use_cpu_initialization = True
    attention = SDPAttention(config, 1, AttnMaskType.causal, "self")
    inputs = _inputs(groups)
    wanted: list[Tensor] = list(inputs)
    sink_N = None if sink == "vanilla" else torch.zeros(N)
    if sink == "learnable":
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        sink_N = attention.softmax_offset
        wanted.append(sink_N)
    documents = DOCUMENTS if apart else None
    output = attention(*inputs, documents)
    expected = _by_definition(inputs, window=window, documents=documents, sink_N=sink_N)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(S, B, N * D, generator=torch.Generator().manual_seed(0))
    got, true = (torch.autograd.grad(x, wanted, grad) for x in (output, expected))
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_documents_attend_as_if_each_were_alone() -> None:
    attention = SDPAttention(_config(2), 1, AttnMaskType.causal, "self")
    inputs = _inputs(2)
    output = attention(*inputs, DOCUMENTS)
    for b in range(B):
        for document in DOCUMENTS[b].unique():
            rows = (DOCUMENTS[b] == document).nonzero().flatten()
            alone = attention(*(x[rows][:, b : b + 1] for x in inputs))
            torch.testing.assert_close(output[rows][:, b : b + 1], alone, rtol=1e-6, atol=1e-6)


def test_places_begin_anew_with_each_document() -> None:
    assert DOCUMENTS.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 2, 2]]
    places = [places_in_documents(row).tolist() for row in DOCUMENTS]
    assert places == [[0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0, 1]]
    assert document_numbers(torch.tensor([5, 5]), end_of_text=1).tolist() == [0, 0]


def test_which_layers_have_the_window() -> None:
    config = _config(2)
    assert not is_windowed(config, 1)
    config.window_size = (3, 0)
    assert [is_windowed(config, layer) for layer in range(1, 5)] == [True] * 4
    config.window_attn_skip_freq = 2
    assert [is_windowed(config, layer) for layer in range(1, 5)] == [True, False, True, False]
    config.window_attn_skip_freq = [0, 1, 1, 0]
    assert [is_windowed(config, layer) for layer in range(1, 5)] == [False, True, True, False]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_model_scores_packed_documents_as_each_alone(attention: str) -> None:
    latent = ["model.attention=mla", "model.qk_norm=false", "model.num_query_groups=4"]
    config = compose(
        ["experiment=tiny_mone", "model.attention_sink=zero", "model.attention_window=5"]
        + (latent if attention == "mla" else [])
    )
    transformer = transformer_config(
        config, dtype=torch.float32, on_cpu=True, sequence_parallel=False
    )
    model = build_gpt(
        config,
        transformer,
        vocab_size=64,
        sources=MicrobatchSources((0,)),
        on_cpu=True,
        vp_stage=None,
    ).eval()
    tokens = torch.randint(2, 64, (1, 24), generator=torch.Generator().manual_seed(5))
    tokens[0, [7, 8, 19]] = 1  # four documents, one of a single token
    documents = document_numbers(tokens, end_of_text=1)
    labels = tokens.roll(-1, dims=1)

    def losses(rows: Tensor, documents: Tensor | None) -> Tensor:
        places = torch.arange(len(rows))[None]
        found: Tensor = model(tokens[:, rows], places, documents, labels=labels[:, rows])
        return found[0]

    everything = torch.arange(tokens.shape[1])
    with torch.no_grad():
        packed = losses(everything, documents)
        alone = [losses(everything[documents[0] == number], None) for number in range(4)]
        mixed = losses(everything, None)
    torch.testing.assert_close(packed, torch.cat(alone), rtol=2e-6, atol=2e-6)
    assert (packed - mixed).abs().max() > 1e-4


# Context parallelism ----------


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_places_of_context_ranks_are_megatron_cores(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group:
        def __init__(self, rank: int) -> None:
            self.place = rank

        def size(self) -> int:
            return ranks

        def rank(self) -> int:
            return self.place

    # What 0.19 asks of a group.
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size())
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank())
    length = 2 * ranks * 3
    for rank, mine in enumerate(context_positions(length // ranks, ranks)):
        whole = {"tokens": torch.arange(length)[None]}
        group: Any = Group(rank)
        assert mine.tolist() == part_of_context_rank(whole, group)["tokens"][0].tolist()


LONG = 12


def _context_parallel(window: int | None, sink: str) -> list[Tensor]:
    """This rank's output and gradients, and those that one process would have in their place."""
    open_groups(ParallelConfig(context=2), TrainConfig(), timeout_seconds=300)
    config = _config(2)
    config.softmax_type = sink
    config.window_size = None if window is None else (window, 0)
    config.use_cpu_initialization = True
    alone = SDPAttention(config, 1, AttnMaskType.causal, "self")
    config.context_parallel_size = 2
    attention = SDPAttention(config, 1, AttnMaskType.causal, "self")
    assert attention.context_group is not None
    mine = context_positions(LONG // 2, 2)[attention.context_group.rank()]
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(LONG, B, heads, D, generator=generator) for heads in (N, 2, 2)]
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    grad = torch.randn(LONG, B, N * D, generator=generator)
    leaves = [x.clone().requires_grad_() for x in whole]
    expected = alone(*leaves, documents)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    parts = [x[mine].clone().requires_grad_() for x in whole]
    output = attention(*parts, documents)
    grads = torch.autograd.grad(output, parts, grad[mine])
    return [
        *(output.detach(), expected[mine].detach()),
        *(x for got, true in zip(grads, expected_grads, strict=True) for x in (got, true[mine])),
    ]


@pytest.mark.parametrize(("window", "sink"), [(None, "vanilla"), (4, "off-by-one")])
def test_context_ranks_attend_together_as_one(
    two_processes: Processes, window: int | None, sink: str
) -> None:
    for tensors in two_processes.run(_context_parallel, window, sink):
        assert len(tensors) == 8
        for got, true in zip(tensors[::2], tensors[1::2], strict=True):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)
