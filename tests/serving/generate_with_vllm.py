"""Generates with vLLM, in an environment that has it: generate_with_vllm.py JOBS.json RESULTS.json.

A job is {"name", "model", "prompts": lists of token numbers, "new", "options": of vllm.LLM,
"record": a file for what the routed experts select by and keep, or nothing}. All run in this
process, one after the other: importing vLLM takes longer than a small model.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def recording(path: str | None) -> Iterator[None]:
    """Writes what every selection read and gave, of whatever runs in this process meanwhile."""
    if path is None:
        yield
        return
    import torch
    from mone_vllm.selection import Selection

    seen: list[dict[str, Any]] = []
    mask = Selection.mask

    def recorded(self: Any, gate_TF: Any, up_TF: Any, **rows: Any) -> Any:
        kept = mask(self, gate_TF, up_TF, **rows)
        seen.append({"gate": gate_TF.clone(), "up": up_TF.clone(), "rows": rows, "mask": kept})
        return kept

    Selection.mask = recorded
    try:
        yield
    finally:
        Selection.mask = mask
        torch.save(seen, path)


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Returns tokens and logprobs of one job, or the error that it ended with."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "seed": 0}
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new"], logprobs=1, prompt_logprobs=0, ignore_eos=True
    )
    started = time.monotonic()
    try:
        llm = LLM(job["model"], **options | job.get("options", {}))
        loaded = time.monotonic()
        with recording(job.get("record")):
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
                sampling,
                use_tqdm=False,
            )
        texts = []
        for prompt, output in zip(job["prompts"], outputs, strict=True):
            first = output.outputs[0]
            texts.append(
                {
                    "prompt": [
                        place[token].logprob
                        for place, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
                    ],
                    "tokens": list(first.token_ids),
                    "logprobs": [
                        place[token].logprob
                        for place, token in zip(first.logprobs, first.token_ids, strict=True)
                    ],
                }
            )
        result = {"texts": texts, "loaded": loaded - started, "took": time.monotonic() - loaded}
        llm = None
    except Exception as error:  # whatever refuses is what the test looks at
        result = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    """Runs all jobs."""
    jobs, results = map(Path, sys.argv[1:3])
    found = {}
    for job in json.loads(jobs.read_text()):
        print("=====", job["name"], flush=True)
        found[job["name"]] = generate(job)
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    # In this process; a job with several ranks has processes of its own anyway.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
