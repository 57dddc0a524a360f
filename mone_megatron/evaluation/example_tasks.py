"""Makes two tasks from the source of the Python standard library that is running.

They are examples of task files on local data (copy one and change it), and what evaluation is
tested with where there is no network. The questions come from the files at the end of the order in
which the built-in corpus holds them: with its default split, those are not trained on.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mone_megatron.data.stdlib import stdlib_files
from mone_megatron.whole_files import write_whole

_NEXT_LINE, _LAST_WORD = "stdlib_next_line", "stdlib_last_word"
# The validation share of mone_megatron/config/data.py.
_SHARE = 0.05
_QUESTIONS, _EXAMPLES = 500, 32
_LINES, _CHOICES = 8, 4
_SENTENCE = re.compile(r"^\s*(?:# )?([A-Z][\w ,'`()-]{40,})\.$", re.MULTILINE)

_NEXT_LINE_YAML = """\
# Which line of code follows? The others are lines of the same file. Chance is 1 in 4.
task: stdlib_next_line
dataset_path: json
# Relative to this file.
dataset_kwargs:
  data_files: {train: stdlib_next_line_train.jsonl, test: stdlib_next_line.jsonl}
training_split: train
test_split: test
output_type: multiple_choice
# Keys of the JSON objects.
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: "\\n"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
_LAST_WORD_YAML = """\
# The last word of a sentence in a comment or docstring, as LAMBADA asks for it.
task: stdlib_last_word
dataset_path: json
# Relative to this file.
dataset_kwargs:
  data_files: {train: stdlib_last_word_train.jsonl, test: stdlib_last_word.jsonl}
training_split: train
test_split: test
output_type: loglikelihood
doc_to_text: context
doc_to_target: word
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_example_tasks(folder: Path) -> list[Path]:
    """Writes both tasks, YAML and questions, into ``folder``; returns the two YAML files.

    Raises:
        ValueError: the library's sources are not installed.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root, 0)
    held_out = files[-round(_SHARE * len(files)) :]
    texts = [(root / path).read_text(encoding="utf-8", errors="ignore") for path in held_out]
    if not texts:
        raise ValueError(f"{root}: no sources of the standard library to ask about")
    paths = []
    for name, settings, questions in (
        (_NEXT_LINE, _NEXT_LINE_YAML, list(_next_lines(texts))),
        (_LAST_WORD, _LAST_WORD_YAML, list(_last_words(texts))),
    ):
        # The same questions in the same order wherever this Python runs.
        random.Random(name).shuffle(questions)
        lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
        write_whole(folder / f"{name}_train.jsonl", "".join(lines[:_EXAMPLES]))
        chosen = lines[_EXAMPLES : _EXAMPLES + _QUESTIONS]
        write_whole(folder / f"{name}.jsonl", "".join(chosen))
        paths.append(write_whole(folder / f"{name}.yaml", settings))
    return paths


def _next_lines(texts: list[str]) -> Iterator[dict[str, object]]:
    for text in texts:
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        choices = random.Random(text)
        for start in range(0, len(lines) - _LINES, 2 * _LINES):
            answer = lines[start + _LINES]
            others = sorted(set(lines) - {answer})
            if len(others) < _CHOICES - 1 or len(answer.strip()) < 8:
                continue
            options = [answer, *choices.sample(others, _CHOICES - 1)]
            choices.shuffle(options)
            yield {
                "context": "\n".join(lines[start : start + _LINES]),
                "choices": options,
                "answer": options.index(answer),
            }


def _last_words(texts: list[str]) -> Iterator[dict[str, object]]:
    for text in texts:
        for sentence in _SENTENCE.findall(text):
            context, _, word = sentence.rpartition(" ")
            if word.isalpha():
                yield {"context": context, "word": f" {word}"}
