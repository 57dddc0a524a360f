"""Finding, loading and running tasks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evaluation_helpers import MAX_LENGTH
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_megatron.evaluation import tasks
from mone_megatron.evaluation.example_tasks import write_example_tasks
from mone_megatron.evaluation.harness import run_tasks
from mone_megatron.evaluation.tasks import TaskRequest, expand, load_tasks

Models = tuple[Path, Path]


def test_lists_expand_and_name_shipped_tasks() -> None:
    usual, flame = expand(["usual"]), expand(["flame"])
    assert len(usual) == 10
    assert {request.num_fewshot for request in usual} == {0}
    assert {request.spec: request.num_fewshot for request in flame} == {
        "arc_easy": 10,
        "arc_challenge": 10,
        "hellaswag": 10,
        "piqa": 10,
        "openbookqa": 0,
        "winogrande": 0,
    }
    shipped = {
        name for path in tasks._SHIPPED.glob("**/*.yaml") for name in tasks._task_names(path)
    }
    assert {request.spec for request in [*usual, *flame]} <= shipped
    with pytest.raises(ValueError, match="arc_easy: named twice"):
        expand(["usual", "arc_easy"])


def test_tasks_of_the_network_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sciq: its data comes from the network") as caught:
        load_tasks([TaskRequest("sciq")])
    assert "\n" not in str(caught.value)


def test_example_tasks_are_the_same_each_time(tmp_path: Path, example_tasks: list[Path]) -> None:
    again = write_example_tasks(tmp_path)
    for one, other in zip(example_tasks, again, strict=True):
        assert one.name == other.name
        for path in (one, one.with_suffix(".jsonl")):
            assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    questions = [json.loads(line) for line in (tmp_path / "stdlib_next_line.jsonl").open()]
    assert len(questions) > 100
    answers = np.bincount([question["answer"] for question in questions], minlength=4)
    assert answers.min() > 0.15 * len(questions)


def harness_model(folder: Path) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        backend="causal",
        max_length=MAX_LENGTH,
        batch_size=4,
    )


def likelihood(lm: HFLM, context: str, continuation: str) -> float:
    """Directly, without the harness."""
    encode = lm.tokenizer.encode
    whole, begin = encode(context + continuation), len(encode(context))
    # What is too long loses its beginning.
    begin -= max(0, len(whole) - MAX_LENGTH - 1)
    ids = torch.tensor([whole[-MAX_LENGTH - 1 :]])
    with torch.no_grad():
        logs = lm.model(ids[:, :-1]).logits.log_softmax(-1)[0]
    chosen = logs.gather(1, ids[0, 1:, None])[begin - 1 :]
    return float(chosen.sum())


def test_scores_are_those_of_the_model(models: Models, example_tasks: list[Path]) -> None:
    lm = harness_model(models[0])
    loaded = load_tasks([TaskRequest(str(path)) for path in example_tasks])
    scores = {(score.task, score.metric): score for score in run_tasks(lm, loaded, limit=12)}
    folder = example_tasks[0].parent

    def questions(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / f"{name}.jsonl").open()][:12]

    hits = []
    for question in questions("stdlib_next_line"):
        chances = [
            likelihood(lm, question["context"], f"\n{choice}") for choice in question["choices"]
        ]
        hits.append(float(np.argmax(chances) == question["answer"]))
    accuracy = scores["stdlib_next_line", "acc"]
    assert accuracy.estimate.value == pytest.approx(np.mean(hits))
    assert accuracy.estimate.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(12))
    assert (accuracy.estimate.count, accuracy.num_fewshot) == (12, 0)
    assert accuracy.higher_is_better is True

    logs = [likelihood(lm, q["context"], q["word"]) for q in questions("stdlib_last_word")]
    perplexity = scores["stdlib_last_word", "perplexity"]
    assert perplexity.estimate.value == pytest.approx(math.exp(-np.mean(logs)), rel=1e-4)
    assert perplexity.estimate.stderr > 0
    assert perplexity.higher_is_better is False


def test_running_again_asks_the_same_and_draws_nothing(
    models: Models, example_tasks: list[Path]
) -> None:
    lm = harness_model(models[0])
    loaded = load_tasks([TaskRequest(str(example_tasks[0]))], num_fewshot=2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, second = run_tasks(lm, loaded, limit=6), run_tasks(lm, loaded, limit=6)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [score.samples for score in first] == [score.samples for score in second]
    assert [score.estimate.value for score in first] == [score.estimate.value for score in second]
    assert first[0].num_fewshot == 2


def test_a_folder_of_tasks_and_groups(
    models: Models, example_tasks: list[Path], tmp_path: Path
) -> None:
    folder = example_tasks[0].parent
    by_name = load_tasks([TaskRequest("stdlib_next_line")], include_paths=[folder])
    assert list(by_name.tasks) == ["stdlib_next_line"]
    with pytest.raises(ValueError, match="no such folder"):
        load_tasks([TaskRequest("stdlib_next_line")], include_paths=[tmp_path / "nowhere"])


def _task_file(folder: Path, **changes: object) -> Path:
    settings: dict[str, object] = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "word",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({}, None, r"its data file .*mine.jsonl is not there"),
        ({}, "", r"its data file .*mine.jsonl is empty"),
        ({}, "not json", r"mine.yaml: cannot be loaded"),
        ({"task": None}, "{}", r"not a task file: it has no `task: NAME`"),
        ({"doc_to_text": "{{absent.key}}"}, '{"context": "a", "word": "b"}', r"mine"),
        ({"num_fewshot": 3}, '{"context": "a", "word": "b"}', r"mine: its first question"),
    ],
)
def test_task_files_that_do_not_work_are_refused_in_one_line(
    changes: dict[str, object], data: str | None, message: str, tmp_path: Path
) -> None:
    path = _task_file(tmp_path, **changes)
    if data is not None:
        (tmp_path / "mine.jsonl").write_text(data, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks([TaskRequest(str(path))])
    assert "\n" not in str(caught.value)


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.yaml: not a task file"):
        load_tasks([TaskRequest(str(tmp_path / "bad.yaml"))])
    with pytest.raises(ValueError, match="no such task file"):
        load_tasks([TaskRequest(str(tmp_path / "absent.yaml"))])
