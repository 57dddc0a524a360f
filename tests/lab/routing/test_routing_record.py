"""Recording from transformers models: against their own routing, and with planted structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing as npt
import pytest
import torch
from hf_models import DENSE, MOES, VOCABULARY, random_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import mone_megatron.hf  # noqa: F401  # registers the experts implementation
from mone_megatron.hf.experts_mone import enable_mone, experts_modules
from mone_megatron.lab.routing.bits import unpack
from mone_megatron.lab.routing.record import Batch, record
from mone_megatron.lab.routing.statistics import Limits, measure
from mone_megatron.lab.routing.summary import summarise
from mone_megatron.lab.routing.trace import Trace, TraceHeader, TraceWriter


def record_trace(
    model: PreTrainedModel, batches: Sequence[Batch], folder: Path, **settings: Any
) -> Trace:
    writer = TraceWriter(folder)
    recorded = record(model, batches, writer, **{"keep_ratio": 0.25} | settings)
    domains = tuple(f"d{n}" for n in range(max(batch.domain for batch in batches) + 1))
    return writer.close(
        TraceHeader("model", None, "id", recorded.layers, domains, recorded.selection)
    )


def random_batches(count: int = 2, windows: int = 3, length: int = 10) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [
        Batch(rng.integers(0, VOCABULARY, (windows, length)), domain) for domain in range(count)
    ]


Call = tuple[Tensor, Tensor, Tensor]


def heard(model: PreTrainedModel, batches: Sequence[Batch]) -> list[list[Call]]:
    """What the experts of each layer are given, a call a batch, without recording."""
    calls: list[list[Call]] = []
    handles = []
    for module in experts_modules(model):
        own: list[Call] = []
        calls.append(own)

        def hook(_: nn.Module, inputs: Any, own: list[Call] = own) -> None:
            own.append(inputs)

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(torch.from_numpy(batch.ids_BS))
    for handle in handles:
        handle.remove()
    return calls


def gate_of(experts: Any, expert: int, token_H: Tensor) -> Tensor:
    return (experts.gate_up_proj[expert] @ token_H)[: experts.intermediate_dim]


def smallest_first(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A router that gives the experts of a token in another order."""
    logits, weights_NK, index_NK = outputs
    return logits, weights_NK.flip(-1), index_NK.flip(-1)


@pytest.mark.parametrize("name", [*MOES, "flipped"])
def test_what_is_recorded_is_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = random_model("qwen3_moe" if name == "flipped" else name)
    if name == "flipped":
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(smallest_first)
    batches = random_batches()
    heard_by_layer = heard(model, batches)
    trace = record_trace(model, batches, tmp_path / "trace")
    assert all("forward" not in vars(module) for module in experts_modules(model))
    assert trace.header.selection is not None
    assert trace.header.selection.by == "analysis"
    first_dense = len(model.model.layers) - len(heard_by_layer)
    assert [shape.layer for shape in trace.header.layers] == [
        first_dense + n + 1 for n in range(len(heard_by_layer))
    ]
    for shape, calls, experts in zip(
        trace.header.layers, heard_by_layer, experts_modules(model), strict=True
    ):
        kept = round(0.25 * shape.neurons)
        assert (shape.experts, shape.top_k, shape.kept) == (4, 2, kept)
        for routing, (tokens_NH, index_NK, weight_NK) in zip(
            trace.routings(shape.layer), calls, strict=True
        ):
            assert routing.weights_NK is not None
            assert routing.kept_NKB is not None
            assert (np.diff(routing.weights_NK, axis=1) <= 0).all()
            order_NK = weight_NK.argsort(dim=-1, descending=True, stable=True)
            npt.assert_array_equal(routing.experts_NK, index_NK.gather(1, order_NK))
            npt.assert_allclose(routing.weights_NK, weight_NK.gather(1, order_NK), rtol=1e-4)
            mask_NKF = unpack(routing.kept_NKB, shape.neurons)
            assert (mask_NKF.sum(axis=-1) == kept).all()
            # Each neuron kept is at least as large as each one left out.
            for token in range(0, len(mask_NKF), 7):
                for place, expert in enumerate(routing.experts_NK[token]):
                    gate_F = gate_of(experts, expert, tokens_NH[token]).detach()
                    size_F = experts.act_fn(gate_F).abs().numpy()
                    mask_F = mask_NKF[token, place].astype(bool)
                    assert size_F[mask_F].min() >= size_F[~mask_F].max() - 1e-5


def test_a_model_that_selects_is_recorded_as_it_selects(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    enable_mone(model, keep_ratio=0.5, score="abs_product")
    batches = random_batches(1)
    trace = record_trace(model, batches, tmp_path / "trace", keep_ratio=0.25)
    selection = trace.header.selection
    assert selection is not None
    assert (selection.by, selection.keep_ratio, selection.score) == ("model", 0.5, "abs_product")
    # Later layers see what earlier ones make of their selection.
    for shape, calls in zip(trace.header.layers, heard(model, batches), strict=True):
        (routing,) = trace.routings(shape.layer)
        ((_, index_NK, weight_NK),) = calls
        order_NK = weight_NK.argsort(dim=-1, descending=True, stable=True)
        npt.assert_array_equal(routing.experts_NK, index_NK.gather(1, order_NK))
        assert shape.kept == 8


def small(model_type: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts_per_tok": 2, "initializer_range": 0.2,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **common | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize("score", ["signed_gate", "abs_product"])
def test_experts_with_a_gate_of_their_own(score: str, tmp_path: Path) -> None:
    """GPT-OSS: gate and up interleaved, transposed, with biases, and a gate of its own."""
    model = small("gpt_oss", num_local_experts=4, layer_types=["full_attention"] * 2)
    batches = random_batches(1)
    with pytest.raises(ValueError, match="GptOssExperts computes its gate in a way of its own"):
        record_trace(model, batches, tmp_path / "refused")
    trace = record_trace(model, batches, tmp_path / "trace", score=score)
    (calls, _), experts = heard(model, batches), experts_modules(model)[0]
    ((tokens_NH, _, _),) = calls
    (routing,) = trace.routings(1)
    assert routing.kept_NKB is not None
    mask_NKF = unpack(routing.kept_NKB, 48).astype(bool)
    for token in range(0, len(mask_NKF), 3):
        for place, expert in enumerate(routing.experts_NK[token]):
            both = tokens_NH[token] @ experts.gate_up_proj[expert]
            both = (both + experts.gate_up_proj_bias[expert]).detach()
            size_F = both[::2] if score == "signed_gate" else experts._apply_gate(both).abs()
            mask_F = mask_NKF[token, place]
            assert mask_F.sum() == 12
            assert size_F.numpy()[mask_F].min() >= size_F.numpy()[~mask_F].max() - 1e-5


def test_experts_without_a_gate_have_no_neurons(tmp_path: Path) -> None:
    model = small(
        "nemotron_h", hybrid_override_pattern="ME", n_routed_experts=4, moe_intermediate_size=16,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=1, ssm_state_size=8, n_group=1, topk_group=1,
        moe_shared_expert_intermediate_size=16,
    )  # fmt: skip
    trace = record_trace(model, random_batches(1), tmp_path / "trace")
    assert trace.header.selection is None
    (shape,) = trace.header.layers
    assert (shape.layer, shape.experts, shape.neurons) == (2, 4, 0)
    (layer,) = measure(trace).layers
    assert layer.experts.tokens_E.sum() == 60
    assert layer.neurons is None


@pytest.mark.parametrize("name", list(DENSE)[:1])
def test_a_dense_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dense model has no routing"):
        record_trace(random_model(name), random_batches(1), tmp_path / "trace")


def test_what_broken_weights_choose_is_refused(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.gate_up_proj[:, 0].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layer 3: the experts' output is not finite.*--dtype"):
        record_trace(model, random_batches(1), tmp_path / "trace")


# Planted: three tokens whose embeddings are axes, which the first layer passes on to its experts.
A, B, C = 11, 22, 33


def planted_model() -> PreTrainedModel:
    """Expert 3 takes token A only; of expert 0 neurons 12 to 15 are dead and 0 to 3 always kept.

    Token B goes to experts 0 and 1, token C to 0 and 2, token A to 3 and 1. In expert 0, token B
    also keeps neurons 4 to 7 and token C 8 to 11.
    """
    model = random_model("qwen3_moe", num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.post_attention_layernorm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight
        for axis, token in enumerate((A, B, C)):
            embedding[token] = 0
            embedding[token, axis] = 1
        router = layer.mlp.gate.weight
        router.zero_()
        #                        A     B     C
        router[0, :3] = torch.tensor([-2.0, 2.0, 2.0])
        router[1, :3] = torch.tensor([1.0, 1.0, 0.0])
        router[2, :3] = torch.tensor([0.0, 0.0, 1.0])
        router[3, :3] = torch.tensor([2.0, -2.0, -2.0])
        gate = layer.mlp.experts.gate_up_proj[0, :16]
        gate.zero_()
        gate[0:4, :3] = 2.0
        gate[4:8, 1] = 1.0
        gate[8:12, 2] = 1.0
    return model


def test_planted_structure_is_found(tmp_path: Path) -> None:
    ids = np.array([[A, B, B, C, B, C, C, A, B, C] * 3])
    batches = [Batch(ids, 0), Batch(np.array([[B] * 12]), 1)]
    trace = record_trace(planted_model(), batches, tmp_path / "trace", keep_ratio=0.5)
    limits = Limits(min_count=4)
    statistics = measure(trace, limits=limits)
    vocabulary = statistics.vocabulary
    assert dict(zip(vocabulary.ids_V.tolist(), vocabulary.counts_V.tolist(), strict=True)) == {
        B: 24, C: 12, A: 6,
    }  # fmt: skip
    (layer,) = statistics.layers
    experts, neurons = layer.experts, layer.neurons
    assert neurons is not None
    npt.assert_array_equal(experts.tokens_E, [36, 30, 12, 6])
    # Token specialisation: the rows are B, C, A.
    npt.assert_array_equal(experts.token_VE, [[24, 24, 0, 0], [12, 0, 12, 0], [0, 6, 0, 6]])
    npt.assert_array_equal(experts.domain_DE[1], [12, 12, 0, 0])
    npt.assert_array_equal(
        experts.together_EE, [[36, 24, 12, 0], [24, 30, 0, 6], [12, 0, 12, 0], [0, 6, 0, 6]]
    )
    # Expert 0 by neuron.
    npt.assert_array_equal(neurons.kept_EF[0], [36] * 4 + [24] * 4 + [12] * 4 + [0] * 4)
    tokens, domains = neurons.by_token, neurons.by_domain
    # B keeps neuron 4 always, all tokens of the expert in 24 of 36 cases; C keeps neuron 8.
    assert vocabulary.ids_V[tokens.group_EF[0, 4]] == B
    assert vocabulary.ids_V[tokens.group_EF[0, 8]] == C
    npt.assert_allclose(tokens.share_EF[0, [0, 4, 8]], 1)
    npt.assert_allclose(tokens.excess_EF[0, [0, 4, 8]], [0, 1 / 3, 2 / 3], rtol=1e-6)
    # The second domain is B only.
    assert domains.group_EF[0, 4] == 1
    npt.assert_allclose(domains.excess_EF[0, 4], 1 / 3, rtol=1e-6)
    together = next(one for one in neurons.together if one.expert == 0)
    by_neuron = {n: i for i, n in enumerate(together.neurons_M.tolist())}
    i, j, k = (by_neuron[neuron] for neuron in (0, 4, 8))
    assert together.counts_MM[i, j] == 24
    assert together.counts_MM[j, k] == 0
    summary = summarise(layer, vocabulary)
    assert summary.token_specialisation == 1
    assert summary.dead_experts == 0
    dead_elsewhere = (neurons.kept_EF[1:] == 0).sum()
    assert summary.dead_neurons == pytest.approx((4 + dead_elsewhere) / 64)
    # Half of the text is B alone: 12 of 20 in expert 0 of one domain, all in that of the other.
    shares = experts.domain_DE / experts.domain_DE.sum(axis=1, keepdims=True)
    overall = experts.tokens_E / experts.tokens_E.sum()
    wanted = np.abs(shares - overall).sum(axis=1).mean() / 2
    assert summary.domain_specialisation == pytest.approx(wanted)
