"""Every option shipped under conf/ composes, and every experiment validates and counts."""

from __future__ import annotations

import pytest

from mone_megatron.config import Config, validate
from mone_megatron.config.convert import flatten
from mone_megatron.config.layout import smallest_world_size
from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.planning import count_parameters, flops_per_step

EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
PAIRS = [
    ("tiny_moe", "tiny_mone"),
    ("quickstart_moe", "quickstart_mone"),
    ("claims_moe", "claims_mone"),
    *(
        (f"flame_{size}_moe", f"flame_{size}_mone")
        for size in ("38m", "98m", "115m", "290m", "419m", "721m", "1_7b")
    ),
    ("moe_0.9b", "mone_0.9b"),
    ("moe_2.8b", "mone_2.8b"),
    *(
        (f"{name}_moe", f"{name}_mone")
        for name in ("qwen3_30b_a3b", "olmoe_1b_7b", "mixtral_8x7b", "deepseek_v2_lite")
    ),
]
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF_DIR.glob("*/*.yaml")
    if path.parent.name != "experiment"
)


def vocab_size(config: Config) -> int:
    return config.model.vocab_size or config.data.vocab_size


def test_every_experiment_is_in_a_pair() -> None:
    assert sorted(name for pair in PAIRS for name in pair) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_resolve_validate_and_count(name: str) -> None:
    config = compose([f"experiment={name}"])
    assert config.run.name == name
    assert config.run.dir == f"runs/{name}"
    layout = validate(config, world_size=smallest_world_size(config.parallel))
    assert layout.num_microbatches >= 1
    parameters = count_parameters(config.model, config.mone, vocab_size(config))
    flops = flops_per_step(config, vocab_size(config))
    assert 0 < parameters.activated_neurons_only <= parameters.activated_gate_counted
    assert parameters.activated_gate_counted < parameters.total
    assert 0 < flops.ideal <= flops.realised


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    if option.startswith("ablation="):  # sweeps: tests/integration/test_ablations.py
        with pytest.raises(ValueError, match="add -m"):
            compose([option])
    else:
        compose([option])


@pytest.mark.parametrize(("moe", "mone"), PAIRS)
def test_a_pair_differs_in_mone_and_run_only(moe: str, mone: str) -> None:
    baseline, selecting = compose([f"experiment={moe}"]), compose([f"experiment={mone}"])
    left, right = flatten(baseline), flatten(selecting)
    differing = {key for key in left if left[key] != right[key]}
    assert {key.split(".")[0] for key in differing} == {"mone", "run"}
    assert not baseline.mone.enabled
    assert selecting.mone.enabled
    assert selecting.mone.keep_ratio == 0.25
    assert selecting.mone.balance.coeff == 0.01


def test_tiny_runs_at_one_step_and_on_the_layouts_of_the_tests() -> None:
    for overrides, world_size in [
        (["train.steps=1"], 1),
        (["parallel.expert=2"], 2),
        (["parallel.tensor=2", "parallel.expert_tensor=2"], 2),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2),
        (["parallel.tensor=2", "parallel.expert=2"], 4),
        ([], 4),
    ]:
        validate(compose(["experiment=tiny_mone", *overrides]), world_size=world_size)


def test_the_data_option_of_a_large_experiment_can_be_replaced() -> None:
    config = compose(["experiment=flame_38m_moe", "data=stdlib", "device=cpu", "parallel=data"])
    validate(config, world_size=1)
    assert config.data.paths == ()


DOCUMENT = (CONF_DIR.parent / "docs" / "configuration.md").read_text()


def test_the_guide_states_each_key_and_its_default() -> None:
    rows = [line.split(" | ") for line in DOCUMENT.splitlines() if line.startswith("| `")]
    written = {row[0].strip("| `"): row[1].strip("`") for row in rows}
    defaults = flatten(Config())
    assert defaults.keys() <= written.keys()
    config = compose([f"{key}={written[key]}" for key in defaults])
    assert flatten(config) == defaults


def test_the_guide_names_each_option() -> None:
    for option in OPTIONS:
        group, name = option.split("=")
        row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{group}` |"))
        assert f"`{name}`" in row, f"docs/configuration.md: {option} is missing"
