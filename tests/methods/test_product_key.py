"""Single-neuron experts that are found by product keys, against a search of all of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported_models import check_generation
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file, save_file
from test_each_rule import problems
from test_export import export_run, open_run
from test_import import import_model

from mone_megatron.config.load import compose
from mone_megatron.hf import MoneConfig, MoneForCausalLM, checks, enable_mone, export
from mone_megatron.hf.generation import choose_experts
from mone_megatron.hf.importing import model_overrides
from mone_megatron.hf.loading import build_from_checkpoint, load_model
from mone_megatron.kernels.product_keys import ProductKeySizes, product_topk
from mone_megatron.mone.product_key import ProductKeyExperts
from mone_megatron.planning import count_parameters
from mone_megatron.planning.activations import Numerics, whole_layer
from mone_megatron.planning.parameters import product_key_layer
from mone_megatron.testing.launch import run_layouts

HIDDEN, KEYS, SIZE, HEADS = 24, 9, 6, 3


def make_layer(experts_per_head: int) -> ProductKeyExperts:
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True,
    )  # fmt: skip
    sizes = ProductKeySizes(KEYS, SIZE, HEADS, experts_per_head)
    layer = ProductKeyExperts(config, sizes=sizes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("k", [1, 2, 9, 20, 81])
def test_the_best_pairs_are_the_best_of_all_pairs(k: int) -> None:
    scores = torch.randn(50, HEADS, 2, KEYS, generator=torch.Generator().manual_seed(1))
    found, pairs = product_topk(scores, k)
    every = (scores[:, :, 0].unsqueeze(-1) + scores[:, :, 1].unsqueeze(-2)).flatten(-2)
    expected = every.topk(k, dim=-1)
    assert torch.equal(found, expected.values)
    assert torch.equal(pairs, expected.indices)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_a_layer_is_all_its_experts_weighed_by_hand(k: int) -> None:
    layer = make_layer(k)
    tokens = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, bias = layer(tokens)
    assert bias is None

    # Of all experts: their keys are all pairs of half keys side by side, and those that a head
    # does not choose weigh nothing.
    x = tokens.reshape(-1, HIDDEN)
    first, second = layer.key_weight
    keys = torch.cat([first.repeat_interleave(KEYS, dim=0), second.repeat(KEYS, 1)], dim=-1)
    neurons = F.silu(x @ layer.expert_in_weight.T)
    expected = torch.zeros_like(x)
    for rows in layer.query_weight.chunk(HEADS):
        halves = [part / part.square().mean(-1, keepdim=True).add(1e-6).sqrt()
                  for part in (x @ rows.T).chunk(2, dim=-1)]  # fmt: skip
        scores = torch.cat(halves, dim=-1) @ keys.T
        left_out = scores < scores.topk(k, dim=-1).values.amin(dim=-1, keepdim=True)
        weights = scores.masked_fill(left_out, -torch.inf).softmax(dim=-1)
        expected = expected + (weights * neurons) @ layer.expert_out_weight
    torch.testing.assert_close(found.reshape(-1, HIDDEN), expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    inputs = (tokens, *layer.parameters())
    grads = torch.autograd.grad(found, inputs, upstream)
    by_hand = torch.autograd.grad(expected.view_as(found), inputs, upstream)
    for one, other in zip(grads, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_planner_counts_the_weights_that_there_are() -> None:
    sizes = {"keys": KEYS, "key_dim": SIZE, "heads": HEADS, "experts_per_head": 4}
    config = compose(
        ["experiment=tiny_moe", "model.experts=product_key", "model.num_experts=0",
         f"model.hidden_size={HIDDEN}", *(f"model.product_key.{k}={v}" for k, v in sizes.items())]
    )  # fmt: skip
    layer = make_layer(4)
    counted = product_key_layer(config.model)
    assert counted.parameters == sum(weight.numel() for weight in layer.parameters())
    read = layer.query_weight.numel() + layer.key_weight.numel() + HEADS * 4 * 2 * HIDDEN
    assert counted.activated == read
    model = count_parameters(config.model, config.mone, 100)
    assert model.dense_ffn == config.model.num_layers * counted.parameters
    assert model.total - model.activated_gate_counted == config.model.num_layers * (
        counted.parameters - read
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_planner_counts_what_the_backward_pass_keeps(dtype: torch.dtype, size: int) -> None:
    config = compose(
        ["experiment=tiny_moe", "model.experts=product_key", "model.num_experts=0",
         f"model.hidden_size={HIDDEN}", f"model.product_key.keys={KEYS}",
         f"model.product_key.key_dim={SIZE}", f"model.product_key.heads={HEADS}",
         "model.product_key.experts_per_head=4"]
    )  # fmt: skip
    tokens = config.train.micro_batch_size * config.train.seq_length
    layer = make_layer(4).to(dtype)
    x = torch.randn(tokens, 1, HIDDEN, dtype=dtype, requires_grad=True)
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    planned = whole_layer(config, Numerics("cpu", size), moe=False)["MLP"]
    # In bf16 the keys are kept in fp32, too.
    assert real - 4 * layer.key_weight.numel() * (size == 2) == pytest.approx(planned, rel=0.02)


RUN = (
    "experiment=tiny_moe", "device=cpu", "data.max_megabytes=0.2", "train.steps=4",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "checkpoint.interval=2", "model.experts=product_key", "model.num_experts=0",
    "model.product_key.keys=16",
)  # fmt: skip


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("product_key")
    saved = folder / "one" / "checkpoints" / "step_00000002"
    relu = (*RUN, "model.activation=relu", "model.tie_embeddings=false", "model.init_std=0.3")
    run_layouts(
        {"one": RUN, "resumed": (*RUN, f"checkpoint.resume={saved}"), "relu": relu},
        processes=1,
        folder=folder,
    )
    for name in ("one", "relu"):
        export_run(open_run(folder / name), folder / f"{name}-hf")
    return folder


def test_it_trains_and_resumes_bitwise(runs: Path, tmp_path: Path) -> None:
    saved = runs / "one" / "checkpoints" / "step_00000002"
    two = {"data": RUN, "stages": (*RUN, "parallel.pipeline=2")}
    two["elsewhere"] = (*RUN, "parallel.pipeline=2", f"checkpoint.resume={saved}")
    run_layouts(two, processes=2, folder=tmp_path)
    whole = records(runs / "one")
    assert whole[-1]["loss"] < whole[0]["loss"]
    for key in ("loss", "grad_norm"):
        resumed = [record[key] for record in records(runs / "resumed")]
        assert resumed == [record[key] for record in whole[2:]]
    for name, steps in (("data", whole), ("stages", whole), ("elsewhere", whole[2:])):
        for record, expected in zip(records(tmp_path / name), steps, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["one", "relu"])
def test_an_export_is_the_same_model(runs: Path, name: str) -> None:
    source = open_run(runs / name)
    found = checks.check_export(source, runs / f"{name}-hf", dtype=None)
    assert found.holds, found.describe()
    with pytest.raises(ValueError, match=r"cannot hold this model .*experts=product_key"):
        export.choose_architecture(source, "qwen3")
    card = (runs / f"{name}-hf" / "README.md").read_text(encoding="utf-8")
    assert "model of product-key experts" in card
    assert "| experts, a token | 256 of one neuron, 64 in 4 heads |" in card


def test_the_check_sees_other_keys_and_other_experts(runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / "relu")
    # After it nothing is chosen any more.
    last = f"model.layers.{source.model.num_layers - 1}.mlp"
    for name in ("key_weight", "expert_in_weight", "expert_out_weight", "query_weight"):
        folder = tmp_path / name
        shutil.copytree(runs / "relu-hf", folder)
        weights = load_file(folder / "model.safetensors")
        weight = weights[f"{last}.{name}"]
        # Of the keys, one; of the tables, all rows in another order.
        changed = weight.roll(1, dims=0) if weight.ndim == 2 else weight.clone()
        if weight.ndim == 3:
            changed[1, 3] *= -1
        weights[f"{last}.{name}"] = changed
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found = checks.check_export(source, folder, dtype=None)
        assert not found.holds, name
        chosen = "another choice of experts" in found.describe()
        assert chosen == (name in ("key_weight", "query_weight"))


@pytest.mark.parametrize("name", ["one", "relu"])
def test_an_export_generates_what_it_reads_at_once(runs: Path, name: str) -> None:
    check_generation(runs / f"{name}-hf")


def test_an_import_comes_back_to_it(runs: Path, tmp_path: Path) -> None:
    again, was = (
        open_run(import_model(runs / "relu-hf", tmp_path / "ours")),
        open_run(runs / "relu"),
    )
    assert again.model.experts == "product_key"
    assert again.model.product_key == was.model.product_key
    printed = compose(["experiment=tiny_moe", *model_overrides(again.model, again.mone)]).model
    assert (printed.experts, printed.product_key) == ("product_key", was.model.product_key)
    now = build_from_checkpoint(again).state_dict()
    for key, tensor in build_from_checkpoint(was).state_dict().items():
        assert torch.equal(now[key], tensor), key


def test_what_an_export_cannot_be_is_refused_by_its_key(runs: Path) -> None:
    model = load_model(str(runs / "one-hf")).model
    settings = model.config.to_dict()
    # transformers' other name of `num_experts`.
    del settings["num_local_experts"]
    settings["num_experts"] = 0
    assert MoneConfig(**settings).product_key == settings["product_key"]
    for key, value in (("mone", {"keep_ratio": 0.5}), ("num_experts", 4), ("rectified_up", True)):
        with pytest.raises(ValueError, match=f"^{key}: .* beside product_key, whose experts are"):
            MoneConfig(**(settings | {key: value}))
    with pytest.raises(ValueError, match=r"^product_key: .* is not understood"):
        MoneForCausalLM(MoneConfig(num_experts=0, product_key={"keys": 4}))
    for targets, says in (
        (["routed"], "has no experts behind transformers' experts interface"),
        (["dense"], "mone.apply_to: MoneForCausalLM here has no dense MLPs"),
        (["shared"], "mone.apply_to: MoneForCausalLM here has no shared MLPs"),
    ):
        with pytest.raises(ValueError, match=says):
            enable_mone(model, keep_ratio=0.5, apply_to=targets)
    with pytest.raises(ValueError, match="--experts: MoneForCausalLM has no experts to compute by"):
        choose_experts(model, "mone_sparse")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=8"], "model.num_experts: 8 with model.experts=product_key, whose"),
        (["parallel.tensor=2"], "parallel.tensor: 2 splits MLPs, and every rank has all experts"),
        (["parallel.expert=2"], "parallel.expert: 2 splits experts and model.num_experts=0"),
        (
            ["mone.enabled=true", "mone.apply_to=[dense]"],
            "mone.enabled: true selects neurons of an expert, and those of model.experts=product",
        ),
        (["model.activation=drelu"], "model.activation: drelu changes the up projection, which"),
        (
            ["model.product_key.keys=3"],
            "model.product_key.experts_per_head: 16 is more than the 9 experts of",
        ),
    ],
)
def test_what_it_cannot_be_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(
        problems("mone.enabled=false", "model.experts=product_key", "model.num_experts=0",
                 *overrides)
    )  # fmt: skip
    assert found, overrides
    assert found[0].startswith(message), found
