"""Neuron selection under transformers' own parallelism: every kind of model as on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY, random_model
from mone_models import VARIANTS, build
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from mone_megatron.hf import decode_mone, enable_mone
from mone_megatron.hf.parallel_mone import Neurons
from mone_megatron.kernels.reference import topk_mask
from mone_megatron.testing.processes import Processes

EVERYWHERE = ("routed", "shared", "dense")


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


# Name -> a model that selects, and how it is told to once it is loaded: exports know by themselves.
STOCK: dict[str, dict[str, Any]] = {
    "qwen3_moe_dense_first": {"keep_ratio": 0.25},
    "qwen2_moe": {"keep_ratio": 0.5, "score": "abs_gate"},
    "mixtral": {"keep_ratio": 0.25, "score": "signed_gate"},
    "olmoe": {"keep_ratio": 0.125, "score": "abs_product"},
    "deepseek_v2": {"keep_ratio": 0.25},
}
EXPORTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in VARIANTS},
    "everywhere": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 24},
    "no norm": {"qk_norm": "none"},
    "latent without query rank": {**VARIANTS["latent"], "q_lora_rank": None},
    # A score that reads the down projection, too.
    "wina": {
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 24,
        "mone": {"keep_ratio": 0.25, "score": "wina", "apply_to": list(EVERYWHERE)},
    },
    # Rules that rank groups of adjacent neurons over the ranks, and that add up over them.
    **{
        rule: {
            "mlp_only_layers": [0],
            "shared_expert_intermediate_size": 24,
            "mone": {
                "keep_ratio": 0.5,
                "apply_to": list(EVERYWHERE),
                "rule": rule,
                "rule_options": options,
            },
        }
        for rule, options in (("blocks", {"size": 4}), ("statistical", {}))
    },
    # Tokens of different numbers of experts.
    "relu router": {"router_kind": "relu"},
    "batched": {},
    # Neurons that the ranks cannot share evenly, and of which one has fewer than K.
    "batched, uneven": {"moe_intermediate_size": 15, "mone": {"keep_ratio": 0.55}},
}


def implementation(name: str) -> dict[str, str]:
    return {"experts_implementation": "mone_batched_mm"} if name.startswith("batched") else {}


def model_of(name: str) -> PreTrainedModel:
    if name in STOCK:
        model = random_model(name)
        enable_mone(model, **STOCK[name])
        return model
    if name in VARIANTS:
        return build(name)
    changes = {"mone": {"keep_ratio": 0.25, "apply_to": list(EVERYWHERE)}} | EXPORTS[name]
    return build("plain", **changes, **implementation(name))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens()).logits
    return logits


def logits_and_gradient(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Without and with gradients, which take different ways through transformers' layers."""
    logits = logits_of(model)
    embedding = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embedding).logits.square().sum().backward()
    assert embedding.grad is not None
    return logits, embedding.grad


def load_and_run(name: str, folder: str, distributed: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """In each rank."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**distributed), **implementation(name)
    ).eval()
    if name in STOCK:
        enable_mone(model, **STOCK[name])
    # Its pipelines do not train.
    return (logits_of(model),) if "pp_size" in distributed else logits_and_gradient(model)


SPLIT: dict[str, dict[str, Any]] = {
    "tensor": {"tp_size": 2},
    "expert": {"tp_size": 2, "ep_size": 2},
    "fully sharded": {"fsdp_size": 2},
    "pipeline": {"pp_size": 2},
}
# Split within experts and MLPs every kind of model differs; split between them, a few will do.
CASES = [(kind, name) for kind in ("tensor", "expert") for name in STOCK | EXPORTS]
CASES += [
    (kind, name) for kind in ("fully sharded", "pipeline") for name in ("everywhere", "olmoe")
]
# transformers has no plan for it.
CASES.remove(("expert", "deepseek_v2"))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_model_is_the_one_of_one_device(
    kind: str, name: str, two_processes: Processes, tmp_path: Path
) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    expected = logits_and_gradient(model)
    for found in two_processes.run(load_and_run, name, str(tmp_path), SPLIT[kind]):
        for ours, theirs in zip(found, expected, strict=False):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def masks_of_parts(scores: list[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """In each rank: the masks of its columns."""
    mesh = init_device_mesh("cpu", (2,))
    masks = []
    for each in scores:
        neurons = Neurons("test", each.shape[-1], mesh)
        parts = each.split(neurons.widths(), dim=-1)
        masks.append(neurons.topk_mask(parts[mesh.get_local_rank()], kept))
    return masks


def test_ranks_keep_what_one_would_ties_and_nan_included(two_processes: Processes) -> None:
    random = torch.Generator().manual_seed(5)
    # Few values: almost every row ties at its threshold, within ranks and across.
    scores = [torch.randint(4, (40, width), generator=random).float() for width in (16, 15, 7, 6)]
    scores += [scores[0].bfloat16(), scores[0].unflatten(0, (8, 5)), torch.zeros(3, 9)]
    scores += [scores[1].where(scores[1] > 0, -torch.inf), torch.full((2, 8), -torch.inf)]
    scores += [scores[0].where(scores[0] < 3, torch.nan), torch.zeros(0, 8)]
    # All on the first rank, all on the second.
    scores += [torch.arange(8.0).expand(2, 8), -torch.arange(8.0).expand(2, 8)]
    for kept in (1, 3, 5, 6):
        by_rank = two_processes.run(masks_of_parts, scores, kept)
        for number, each in enumerate(scores):
            whole = torch.cat([masks[number] for masks in by_rank], dim=-1)
            assert torch.equal(whole, topk_mask(each, kept)), (number, kept)


def refusals(stock: str, export: str) -> list[str]:
    """In each rank: what is said where the ranks that share neurons are not known, or cannot."""
    split = {"distributed_config": DistributedConfig(tp_size=2)}
    unknown = AutoModelForCausalLM.from_pretrained(stock, **split)
    sparse = AutoModelForCausalLM.from_pretrained(export, **split)
    sparse.set_experts_implementation("mone_sparse")
    told = []
    with pytest.MonkeyPatch.context() as patch:
        # Layers of any size, then.
        patch.setattr(decode_mone, "OVERHEAD_BYTES", 0)
        for model in (unknown, sparse):
            with pytest.raises(ValueError, match="over") as error, torch.no_grad():
                model(tokens()[:1, :1])
            told.append(str(error.value))
    return told


def test_what_cannot_be_ranked_is_refused(two_processes: Processes, tmp_path: Path) -> None:
    for name in ("mixtral", "plain"):
        model_of(name).save_pretrained(tmp_path / name)
    found = two_processes.run(refusals, str(tmp_path / "mixtral"), str(tmp_path / "plain"))
    for unknown, sparse in found:
        assert unknown.startswith("MixtralExperts: its neurons are split over ranks")
        assert "enable_mone(model, keep_ratio=...) after from_pretrained" in unknown
        assert sparse == "mone_sparse: MoneExperts is spread over devices; use mone"


@pytest.mark.parametrize("target", EVERYWHERE)
def test_neurons_that_something_else_splits_are_refused(target: str) -> None:
    """As engines do that put slices of the matrices in the place of the whole ones."""
    model = model_of("everywhere")
    mlp = {
        "routed": model.model.layers[1].mlp.experts,
        "shared": model.model.layers[1].mlp.shared_expert,
        "dense": model.model.layers[0].mlp,
    }[target]
    if target == "routed":
        half = mlp.gate_up_proj.unflatten(1, (2, -1))[:, :, :8].flatten(1, 2)
        mlp.gate_up_proj = torch.nn.Parameter(half)
        mlp.down_proj = torch.nn.Parameter(mlp.down_proj[:, :, :8].contiguous())
    else:
        half = mlp.gate_proj.out_features // 2
        for name in ("gate_proj", "up_proj"):
            layer = getattr(mlp, name)
            layer.weight = torch.nn.Parameter(layer.weight[:half])
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :half])
    with pytest.raises(ValueError, match=r"of its \d+ neurons are computed here, where"):
        model(tokens())
