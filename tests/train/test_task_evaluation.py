"""Tasks during training: the same numbers in every layout, and training does not notice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scoring_ranks import error_of_tasks, sharded_scores

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.evaluation.evaluate import Settings, evaluate_model
from mone_megatron.evaluation.example_tasks import write_example_tasks
from mone_megatron.evaluation.models import look_at
from mone_megatron.evaluation.tasks import TaskRequest, load_tasks
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.processes import Processes
from mone_megatron.train.evaluate.tasks import _same_random_state

LIMIT = 7
# The vocabulary is padded, and by more than one of two ranks' columns have a place for.
BASE = [
    "experiment=tiny_mone", "device.kind=cpu", "train.steps=2", "train.global_batch_size=4",
    "model.num_layers=2",
    "data.max_megabytes=0.3", "data.vocab_size=400", "model.vocab_padding_multiple=256",
    "logging.wandb.mode=disabled", "logging.progress=none", "checkpoint.interval=2",
]  # fmt: skip
LAYOUTS = {
    "expert": ["parallel.expert=2"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
}


def _rolling_task(folder: Path) -> Path:
    """Whole texts, some longer than the model reads at once, which repeat themselves."""
    texts = [{"text": f"def f_{n}():\n    return {n}\n" * (1 + 7 * n)} for n in range(LIMIT)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (folder / "rolling.jsonl").write_text(lines, encoding="utf-8")
    metrics = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (
            ("bits_per_byte", "bits_per_byte"),
            ("word_perplexity", "weighted_perplexity"),
        )
    ]
    settings: dict[str, Any] = {
        "task": "rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rolling.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": metrics,
    }
    path = folder / "rolling.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tasks")
    return [*map(str, write_example_tasks(folder)), str(_rolling_task(folder))]


@pytest.fixture(scope="module")
def runs(tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes in three layouts, and once without tasks."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*BASE, f"data.cache_dir={folder / 'cache'}"]
    asked = [f"train.eval_tasks=[{','.join(tasks)}]", f"train.eval_tasks_limit={LIMIT}"]
    # After the last step, and once also before a step that could notice.
    often = {"expert": 1}
    jobs = {
        name: [*base, *layout, *asked, f"train.eval_tasks_interval={often.get(name, 2)}"]
        for name, layout in LAYOUTS.items()
    }
    jobs["without"] = [*base, *LAYOUTS["expert"]]
    run_layouts(jobs, processes=2, folder=folder)
    return folder


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def scores_of(record: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("eval/")}


def test_all_layouts_give_the_same_scores(runs: Path) -> None:
    expected = scores_of(records(runs / "expert")[-1])
    assert set(expected) == {
        f"eval/{name}{error}"
        for name in (
            "stdlib_next_line/acc", "stdlib_next_line/acc_norm", "stdlib_last_word/acc",
            "stdlib_last_word/perplexity", "rolling/bits_per_byte", "rolling/word_perplexity",
        )
        for error in ("", "_stderr")
    }  # fmt: skip
    for name in LAYOUTS:
        assert scores_of(records(runs / name)[-1]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_scores_are_those_of_eval_hf(runs: Path, tasks: list[str]) -> None:
    settings = Settings(
        batch_size=3, limit=LIMIT, seq_length=16, max_tokens=None, dtype=torch.float32, device="cpu"
    )
    result = evaluate_model(
        look_at(str(runs / "expert")),
        label="run",
        tasks=load_tasks([TaskRequest(task) for task in tasks]),
        corpora=[],
        settings=settings,
        say=lambda message: None,
    )
    found = scores_of(records(runs / "expert")[-1])
    assert len(result.scores) == 6
    for score in result.scores:
        key = f"eval/{score.task}/{score.metric}"
        assert found[key] == pytest.approx(score.estimate.value, rel=1e-4, abs=1e-4)
        assert found[f"{key}_stderr"] == pytest.approx(score.estimate.stderr, rel=1e-3, abs=1e-4)


def test_training_is_bitwise_the_same_without_tasks(runs: Path) -> None:
    keys = ("loss", "grad_norm", "router/load_balancing_loss", "mone/balance_loss")
    with_tasks, without = records(runs / "expert"), records(runs / "without")
    assert [[record[key] for key in keys] for record in with_tasks] == [
        [record[key] for key in keys] for record in without
    ]
    assert not scores_of(without[-1])
    assert "stdlib_next_line/acc" in (runs / "expert" / "report.html").read_text()


@pytest.mark.parametrize("vocab_size", [5, 12, 16])
def test_scores_over_ranks_are_those_of_the_whole_vocabulary(
    vocab_size: int, two_processes: Processes
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(2, 6, 16, generator=generator)
    # Ties, also between ranks: the lowest id is the most likely.
    logits[0, 0, [1, 3, vocab_size - 1]] = 9.0
    # Padding does not count, however large.
    logits[..., vocab_size:] = 50.0
    labels = torch.randint(vocab_size, (2, 6), generator=generator)
    labels[0, 0], labels[1, 1] = 1, vocab_size - 1
    labels[1, 2] = logits[1, 2, :vocab_size].argmax()
    whole = logits[..., :vocab_size].log_softmax(-1)
    for logs, greedy in two_processes.run(sharded_scores, logits, labels, vocab_size):
        torch.testing.assert_close(logs, whole.gather(-1, labels[..., None]).squeeze(-1))
        assert torch.equal(greedy, whole.argmax(-1) == labels)
        assert greedy[0, 0]
        assert greedy[1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.eval_tasks=[sciq]"], "train.eval_tasks_interval: 0 never runs"),
        (["train.eval_tasks_interval=5"], "train.eval_tasks_interval: 5 with no train.eval_tasks"),
        (
            ["train.eval_tasks=[sciq]", "train.eval_tasks_interval=5", "train.eval_tasks_limit=-1"],
            "train.eval_tasks_limit: -1 is negative",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(compose(["experiment=tiny_mone", *overrides]), world_size=1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = compose(
        ["experiment=tiny_mone", "train.eval_tasks=[sciq]", "train.eval_tasks_interval=5"]
    )
    with pytest.raises(ConfigError, match=r"train.eval_tasks: needs lm_eval.*\[hf\]"):
        validate(config, world_size=1)


def test_a_task_that_cannot_be_loaded_is_told_on_every_rank(two_processes: Processes) -> None:
    for told in two_processes.run(error_of_tasks, ("absent.yaml",)):
        assert told == "ValueError: train.eval_tasks: absent.yaml: no such task file"


def test_a_task_that_writes_text_is_refused(tmp_path: Path, two_processes: Processes) -> None:
    path = _task_file(tmp_path, {"output_type": "generate_until", "doc_to_target": "word"})
    for told in two_processes.run(error_of_tasks, (str(path),)):
        assert "mine: has the model write text; use tools/eval_hf.py for it" in told


def test_a_task_that_fails_later_ends_every_rank(tmp_path: Path, two_processes: Processes) -> None:
    # The first question can be written, the second cannot.
    path = _task_file(tmp_path, {"doc_to_target": "{{words[1]}}"})
    first, second = two_processes.run(error_of_tasks, (str(path),))
    assert "UndefinedError" in first
    assert second.startswith("RuntimeError: train.eval_tasks failed on rank 0: UndefinedError")


def _task_file(folder: Path, changes: dict[str, Any]) -> Path:
    questions = [{"context": "a", "word": "b", "words": ["b", "c"]}, {"context": "a", "word": "b"}]
    lines = "".join(json.dumps({"words": None} | question) + "\n" for question in questions)
    (folder / "mine.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return path


def test_tasks_cannot_move_the_random_streams(one_process: None) -> None:
    before = random.getstate(), torch.get_rng_state()
    with _same_random_state():
        random.seed(5)
        torch.manual_seed(5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
