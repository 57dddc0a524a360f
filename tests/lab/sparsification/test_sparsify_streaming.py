"""One layer in memory at a time: the same losses and statistics as with the whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hf_models import ALL, random_model
from safetensors.torch import load_file, save_file
from sparsify_helpers import ignore, random_text
from test_sparsify_pruning import mone_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from mone_megatron.lab.sparsification.layered import LayeredModel, open_layered
from mone_megatron.lab.sparsification.places import choose_targets, decoder_layers
from mone_megatron.lab.sparsification.plans import Plan, dense, plan, uniform
from mone_megatron.lab.sparsification.resident import ResidentEngine
from mone_megatron.lab.sparsification.streaming import StreamedEngine

TEXT = random_text()
PLANS = [
    dense(3),
    uniform("abs_activation", 0.75, 3),
    uniform("random", 0.5, 3),
    uniform("wina", 0.5, 3),
    # These share the first layers with the first plan.
    plan("abs_product", (0, 0, 0.5)),
    plan("abs_product", (0, 0.5, 0)),
]


def measured(engine: ResidentEngine | StreamedEngine, plans: list[Plan]) -> dict[Plan, float]:
    work = 0

    def progress(done: int) -> None:
        nonlocal work
        work += done

    found = {
        each: result.perplexity.loss.value for each, result in engine.measure(plans, TEXT, progress)
    }
    assert work == engine.work(plans, TEXT)
    return found


def layered(folder: Path) -> AbstractContextManager[LayeredModel]:
    return open_layered(str(folder), dtype=torch.float32, device="cpu", say=print)


def compare(model: PreTrainedModel, folder: Path, plans: list[Plan], memory_bytes: int) -> None:
    targets = choose_targets(model, None)
    whole = ResidentEngine(model, targets, seed=3)
    with layered(folder) as opened:
        parts = StreamedEngine(opened, targets, seed=3, memory_bytes=memory_bytes)
        # The same operations in the same order.
        assert measured(parts, plans) == pytest.approx(measured(whole, plans), abs=1e-6)
        assert parts.observe(TEXT, (0.5,), ignore) == whole.observe(TEXT, (0.5,), ignore)
        for layer in decoder_layers(opened.model):
            assert all(weight.is_meta for weight in layer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_a_layer_at_a_time_is_the_whole_model(name: str, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    compare(model, tmp_path, PLANS, 10**9)


def test_an_export_of_ours_selects_in_parts_too(tmp_path: Path) -> None:
    model = mone_model()
    model.save_pretrained(tmp_path)
    plans = [dense(2), uniform("abs_activation", 0.5, 2), uniform("abs_activation", 0.9, 2)]
    compare(model, tmp_path, plans, 10**9)


def test_little_memory_takes_several_passes(tmp_path: Path) -> None:
    model = random_model("mixtral")
    model.save_pretrained(tmp_path)
    one = TEXT.tokens * 32 * 4
    targets = choose_targets(model, None)
    with layered(tmp_path) as opened:
        engine = StreamedEngine(opened, targets, seed=3, memory_bytes=3 * one)
        # Two plans in each of three passes; the last two share the first layer.
        assert engine.work(PLANS, TEXT) == TEXT.tokens * (6 + 6 + (1 + 2 + 2))
    compare(model, tmp_path, PLANS, 3 * one)


def test_only_one_layer_has_weights_at_a_time(tmp_path: Path) -> None:
    random_model("deepseek_v2").save_pretrained(tmp_path)
    with layered(tmp_path) as opened:
        engine = StreamedEngine(opened, ("routed",), seed=3, memory_bytes=10**9)
        seen: list[list[bool]] = []

        def look(work: int) -> None:
            layers = [list(layer.parameters()) for layer in opened.layers]
            seen.append([not any(weight.is_meta for weight in layer) for layer in layers])

        list(engine.measure([dense(3)], TEXT, look))
    batches = len(list(TEXT.batches()))
    one, two, three = [True, False, False], [False, True, False], [False, False, True]
    assert seen == [*[one] * batches, *[two] * batches, *[three] * batches]


def test_plans_that_begin_alike_share_their_layers(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path)
    alone = [plan("abs_gate", [0.5 if at == layer else 0 for at in range(3)]) for layer in range(3)]
    with layered(tmp_path) as opened:
        engine = StreamedEngine(opened, ("routed",), seed=3, memory_bytes=10**9)
        assert engine.work([dense(3), *alone], TEXT) == TEXT.tokens * (2 + 3 + 4)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    random_model("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.self_attn.q_proj.weight"
    save_file({name: one for name, one in tensors.items() if name != lost}, file)
    with layered(tmp_path) as model:
        with model.layer(0):
            pass
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is missing"):
            model.layer(1).__enter__()
    save_file(tensors | {lost: tensors[lost][:16].clone()}, file)
    with layered(tmp_path) as model, pytest.raises(ValueError, match=r"is \(16, 32\), not \(64,"):
        model.layer(1).__enter__()
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    save_file(tensors | {expert: tensors[expert][:4].clone()}, file)
    with layered(tmp_path) as model, pytest.raises(ValueError, match="cannot be converted"):
        model.layer(1).__enter__()
    kept = {name: one for name, one in tensors.items() if name != "model.embed_tokens.weight"}
    save_file(kept, file)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is missing"), layered(tmp_path):
        pass
    with pytest.raises(ValueError, match="--stream: nowhere is no folder"):
        layered(Path("nowhere")).__enter__()
