"""OpenAI's own client against a server: client_of_server.py URL MODEL ASKED.json ANSWERS.json.

ASKED holds "prompts" (lists of token numbers), "text" (a prompt as text) and "new".
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI


def main() -> None:
    """Asks in every way that the tests look at."""
    url, model, asked_file, answers_file = sys.argv[1:5]
    asked: dict[str, Any] = json.loads(Path(asked_file).read_text())
    completions = OpenAI(base_url=f"{url}/v1", api_key="none").completions
    exact = {
        "model": model,
        "max_tokens": asked["new"],
        "temperature": 0,
        "logprobs": 1,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }

    def batch() -> list[dict[str, Any]]:
        answer = completions.create(prompt=asked["prompts"], **exact)
        return [
            {"tokens": choice.token_ids, "logprobs": choice.logprobs.token_logprobs}
            for choice in sorted(answer.choices, key=lambda choice: choice.index)
        ]

    def one(prompt: list[int]) -> dict[str, Any]:
        (choice,) = completions.create(prompt=prompt, **exact).choices
        return {"tokens": choice.token_ids, "logprobs": choice.logprobs.token_logprobs}

    text = {"model": model, "prompt": asked["text"], "max_tokens": asked["new"], "temperature": 0}
    whole = completions.create(**text).choices[0].text
    chunks = [
        chunk.choices[0].text for chunk in completions.create(stream=True, **text) if chunk.choices
    ]
    # Some characters from the middle: the text ends where they begin.
    stop = whole[len(whole) // 2 :][:3]
    stopped = completions.create(stop=[stop], **text).choices[0]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(one, asked["prompts"]))
    answers = {
        "batch": batch(),
        "again": batch(),
        "at once": at_once,
        "whole": whole,
        "chunks": chunks,
        "stop": stop,
        "stopped": stopped.text,
        "finish_reason": stopped.finish_reason,
    }
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
