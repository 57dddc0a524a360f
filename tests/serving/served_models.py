"""Small exports that engines are tried with: every choice that an export can make is in one."""

from __future__ import annotations

from pathlib import Path

from mone_megatron.hf import export
from mone_megatron.hf.source import open_source
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.testing.launch import run_layouts

_COMMON = [
    "device=cpu",
    "train.steps=2",
    "train.seq_length=512",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "model.num_layers=2",
    # The smallest that vLLM's attention has on CPU.
    "model.head_dim=32",
    # Wide enough that every neuron matters to the answer.
    "model.init_std=0.2",
    "checkpoint.interval=2",
    "logging.report=false",
    "logging.wandb.mode=disabled",
]
_EVERYWHERE = [
    "model.first_dense_layers=1",
    "model.shared_expert_ffn_hidden_size=48",
    "mone.apply_to=[routed,shared,dense]",
]
_SIGMOID = [
    "model.router.score_function=sigmoid",
    "model.router.expert_bias=true",
    "model.router.balance=[none]",
    "model.router.balance_coeff=[0]",
    "model.router.scaling_factor=2.5",
]
# Name -> what is trained.
RUNS: dict[str, list[str]] = {
    "plain": ["experiment=tiny_mone"],
    # A gated shared expert, biases, odd widths.
    "gated_shared": [
        "experiment=tiny_mone",
        *_EVERYWHERE,
        "model.shared_expert_gate=true",
        "model.qkv_bias=true",
        "model.expert_ffn_hidden_size=72",
        "mone.keep_ratio=0.4",
        "mone.score=abs_product",
    ],
    # A shared expert without a gate, no QK-norm, tied embeddings, weights that do not sum to 1.
    "plain_shared": [
        "experiment=tiny_mone",
        *_EVERYWHERE,
        "model.qk_norm=false",
        "model.tie_embeddings=true",
        "model.router.pre_softmax=true",
        "mone.score=wina",
    ],
    # Another router within groups of experts, another activation, a norm over all heads, and a rule
    # that keeps as many neurons as it happens to.
    "sigmoid": [
        "experiment=tiny_mone",
        *_SIGMOID,
        "model.router.num_groups=4",
        "model.router.group_topk=2",
        "model.activation=relu2",
        "model.qk_norm_scope=all_heads",
        "mone.score=signed_gate",
        "mone.rule=statistical",
    ],
    "blocks": ["experiment=tiny_mone", "mone.rule=blocks", "mone.rule_options.size=8"],
    # A rule with a state: thresholds of each expert that training moves.
    "learned_threshold": [
        "experiment=tiny_mone",
        *_EVERYWHERE,
        "mone.rule=batch_topk",
        "train.steps=4",
        "checkpoint.interval=4",
    ],
    "learned_in_experts": [
        "experiment=tiny_mone",
        "mone.rule=batch_topk",
        "train.steps=4",
        "checkpoint.interval=4",
    ],
    "threshold": [
        "experiment=tiny_mone",
        "mone.rule=threshold",
        "mone.score=wina_activation",
        "train.steps=4",
        "checkpoint.interval=4",
    ],
    "mass": [
        "experiment=tiny_mone",
        "mone.rule=mass",
        "model.activation=sigmoid",
        "train.steps=4",
        "checkpoint.interval=4",
    ],
    # Leaves out what adds nothing, so it answers as all neurons do.
    "nonzero": [
        "experiment=tiny_mone",
        "mone.rule=nonzero",
        "mone.score=abs_product",
        "model.activation=relu",
    ],
    # Our class for a model that keeps all neurons.
    "all_neurons": ["experiment=tiny_moe", *_SIGMOID],
    # What a stock class holds.
    "stock": ["experiment=tiny_moe"],
}


def _setting(changes: list[str], key: str, usual: str) -> str:
    """What a run's changes say of a key."""
    return next((text.split("=")[1] for text in changes if text.startswith(f"{key}=")), usual)


def _selecting() -> list[list[str]]:
    return [changes for changes in RUNS.values() if "experiment=tiny_mone" in changes]


# Whatever rule or score comes to the registries is tried, too.
for _rule in RULES:
    if (
        _rule.causal
        and not _rule.pools
        and _rule.name not in {_setting(one, "mone.rule", "topk") for one in _selecting()}
    ):
        RUNS[_rule.name] = [
            "experiment=tiny_mone",
            f"mone.rule={_rule.name}",
            f"mone.score={_rule.score or 'abs_gate'}",
            # Enough for a state to move.
            "train.steps=4",
            "checkpoint.interval=4",
        ]
for _score in SCORES.names:
    if _score not in {
        _setting(changes, "mone.score", "abs_activation") for changes in _selecting()
    }:
        RUNS[_score] = ["experiment=tiny_mone", f"mone.score={_score}"]
# Those that keep fewer neurons than there are; rules without a budget may leave out nothing.
PRUNING = [
    name
    for name, changes in RUNS.items()
    if changes in _selecting() and RULES[_setting(changes, "mone.rule", "topk")].keeps_budget
]


def make_exports(folder: Path) -> dict[str, Path]:
    """Trains for two steps, exports, and returns the folder of each model by its name."""
    run_layouts(
        {name: [*_COMMON, *changes] for name, changes in RUNS.items()},
        processes=1,
        folder=folder / "runs",
    )
    return {name: export_run(folder / "runs" / name, folder / "exports" / name) for name in RUNS}


def export_run(run: Path, output: Path) -> Path:
    """Exports a run's newest checkpoint in fp32, without a comparison, and returns its folder."""
    source = open_source(run, say=lambda message: None)
    output.parent.mkdir(parents=True, exist_ok=True)
    export.export(
        source,
        output,
        architecture=export.choose_architecture(source, "auto"),
        dtype=None,
        shard_bytes=10**9,
        check=lambda folder: "not checked",
        progress=lambda message: None,
    )
    return output
