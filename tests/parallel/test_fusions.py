"""What is fused and overlapped: chosen by what is there, said once, and computing the same."""

from __future__ import annotations

import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils

from mone_megatron.config.load import compose
from mone_megatron.parallel import fusions
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches

BESIDE = ("model.shared_expert_ffn_hidden_size=64", "parallel.expert=2")
FROM_TRANSFORMER_ENGINE = (
    (rope_utils, "fused_apply_rotary_pos_emb"),
    *(
        (transformer_engine, name)
        for name in (
            "fused_permute",
            "fused_permute_with_probs",
            "fused_sort_chunks_by_index",
            "fused_sort_chunks_by_index_with_probs",
            "fused_unpermute",
            "fused_topk_with_score_function",
            "fused_compute_score_for_moe_aux_loss",
            "fused_moe_aux_loss",
        )
    ),
)


@pytest.fixture
def with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusions, "have_transformer_engine", lambda: True)
    for module, name in FROM_TRANSFORMER_ENGINE:
        monkeypatch.setattr(module, name, object(), raising=False)


def _off(*overrides: str) -> set[str]:
    config = compose(["experiment=tiny_mone", *overrides])
    return {name for name, why in fusions.reasons(config, on_cpu=False).items() if why is not None}


@pytest.mark.usefixtures("with_transformer_engine")
@pytest.mark.parametrize(
    ("overrides", "off"),
    [
        (BESIDE, set()),
        (("parallel.expert=2",), {"moe_shared_expert_overlap"}),
        ((*BESIDE, "mone.apply_to=[routed,shared]"), {"moe_shared_expert_overlap"}),
        ((*BESIDE, "parallel.dispatcher=allgather"), {"moe_shared_expert_overlap"}),
        ((*BESIDE, "model.router.dtype=fp64"), {"moe_router_fusion"}),
        (
            (*BESIDE, "model.router.kind=expert_choice"),
            {"moe_router_fusion", "moe_permute_fusion"},
        ),
        ((*BESIDE, "model.router.kind=sigmoid_topk"), {"moe_router_fusion"}),
        ((*BESIDE, "model.activation=relu"), {"bias_activation_fusion"}),
        ((*BESIDE, "model.attention=mla"), {"apply_rope_fusion"}),
        (
            ("experiment=tiny_moe", "model.num_experts=0"),
            {"moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap"},
        ),
    ],
)
def test_what_the_model_allows_is_on(overrides: tuple[str, ...], off: set[str]) -> None:
    assert _off(*overrides) == off | {"gradient_accumulation_fusion"}


@pytest.mark.usefixtures("with_transformer_engine")
@pytest.mark.parametrize(("module", "name"), FROM_TRANSFORMER_ENGINE)
def test_a_function_that_is_missing_is_not_used(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    monkeypatch.setattr(module, name, None)
    config = compose(["experiment=tiny_mone"])
    assert f"Transformer Engine has no {name}" in fusions.describe(config)


def test_one_line_says_what_is_on_and_why_others_are_not() -> None:
    line = fusions.describe(compose(["experiment=tiny_mone", *BESIDE]))
    assert "\n" not in line
    on, off = line.split("; not: ")
    assert "shared expert beside the routed" in on
    assert "RoPE (no Transformer Engine)" in off
    assert "gradient reduction (parallel.overlap_grad_reduce=false)" in off
    given = "megatron.transformer.moe_shared_expert_overlap=false"
    on, off = fusions.describe(compose(["experiment=tiny_mone", *BESIDE, f"+{given}"])).split("not")
    assert "shared expert" not in on.split(": ")[1].replace("dense layers and shared experts", "")
    assert given in off


def test_nothing_changes_on_a_cpu() -> None:
    config = compose(["experiment=tiny_mone", *BESIDE])
    fixed, free = fusions.settings(config, on_cpu=True)
    assert set(fixed.values()) == {False}
    assert free == {}


def _losses(overrides: tuple[str, ...], *, fused: bool) -> list[float]:
    """Returns the losses of three steps, with what needs no GPU fused as on one."""
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            switched = {"bias_activation_fusion": True}, {"moe_shared_expert_overlap": True}
            patch.setattr(fusions, "settings", lambda config, on_cpu: switched)
        trainer = build_trainer(
            ["experiment=tiny_mone", "optim.warmup_steps=0", *overrides],
            data_fingerprint="random tokens",
        )
    assert trainer.chunks[0].config.moe_shared_expert_overlap is fused
    batches = random_batches(trainer)
    return [trainer.stepper.train(batches).loss for _ in range(3)]


@pytest.mark.parametrize(
    "overrides",
    [
        (*BESIDE, "model.first_dense_layers=1"),
        (*BESIDE, "parallel.tensor=2"),
        (*BESIDE, "model.shared_expert_gate=true"),
        (*BESIDE, "train.recompute=selective"),
    ],
)
def test_what_is_fused_and_overlapped_computes_the_same(
    four_processes: Processes, overrides: tuple[str, ...]
) -> None:
    plain, fused = (four_processes.run(_losses, overrides, fused=way)[0] for way in (False, True))
    assert len(set(plain)) == 3
    assert fused == pytest.approx(plain, rel=1e-6)
