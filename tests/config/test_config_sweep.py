"""Overrides with several values become one command line for each combination."""

from __future__ import annotations

import pytest

from mone_megatron.config import ConfigError
from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.config.sweep import expand, spell_out_ablation


def test_every_combination_the_last_key_fastest() -> None:
    combinations = expand(["mone=half,quarter", "experiment=tiny_mone", "train.seed=range(1,3)"])
    assert [combination.overrides for combination in combinations] == [
        (mone, "experiment=tiny_mone", seed)
        for mone in ("mone=half", "mone=quarter")
        for seed in ("train.seed=1", "train.seed=2")
    ]
    assert [combination.label for combination in combinations] == [
        "mone_half-seed_1",
        "mone_half-seed_2",
        "mone_quarter-seed_1",
        "mone_quarter-seed_2",
    ]


def test_without_a_sweep_there_is_one_and_it_is_untouched() -> None:
    given = ["experiment=tiny_mone", "data.split=[0.9, 0.1, 0]", "run.name='a, b'"]
    (only,) = expand(given)
    assert (only.label, list(only.overrides)) == ("", given)


def test_labels_are_file_names_and_tell_runs_apart() -> None:
    labels = [one.label for one in expand(["data.split=[0.9,0.1,0],[0.8,0.2,0]"])]
    assert labels == ["split_0.9_0.1_0", "split_0.8_0.2_0"]
    labels = [one.label for one in expand(["run.name='a/b','a?b'"])]
    assert labels == ["0-name_a_b", "1-name_a_b"]


@pytest.mark.parametrize("text", ["train.seed=interval(1,2)", "mone=glob(*)", "train.stepz=1,2"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        expand(["experiment=tiny_mone", text])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "ablation").iterdir()))
def test_every_ablation_can_be_spelt_out(name: str) -> None:
    spelt = spell_out_ablation(["experiment=tiny_mone", f"ablation={name}"])
    combinations = expand(spelt)
    assert len(combinations) >= 2
    for combination in combinations:
        config = compose(combination.overrides)
        assert config.run.dir == f"runs/ablations/tiny_mone/{name}"
        assert config.logging.wandb.group == f"tiny_mone-{name}"


def test_what_else_an_ablation_sets_is_kept_and_the_command_line_wins() -> None:
    spelt = spell_out_ablation(["experiment=tiny_mone", "ablation=shared", "mone=half,quarter"])
    first, second = expand(spelt)
    assert (first.label, second.label) == ("mone_half", "mone_quarter")
    config = compose(first.overrides)
    assert config.model.shared_expert_ffn_hidden_size == config.model.expert_ffn_hidden_size > 0


def test_a_wrong_ablation_is_refused() -> None:
    with pytest.raises(ConfigError, match="ablation: no option 'scores'"):
        spell_out_ablation(["experiment=tiny_mone", "ablation=scores"])
    with pytest.raises(ConfigError, match="ablation: score of which experiment"):
        spell_out_ablation(["ablation=score"])
