"""Decoding with gathered rows against vLLM's own experts: speed_of_experts.py EXPORT [ROUNDS].

Both models are in this process, with random weights of a size that memory is read for, and take
turns; what is printed are medians, in seconds of the processor, which others on the machine disturb
less than those of the clock (so OMP_NUM_THREADS=1). The first keeps a quarter of the neurons, the
second all, which is computed by vLLM's packed kernel.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
_SIZES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
_NEW = 16


def main() -> None:
    """Measures."""
    from vllm import LLM, SamplingParams

    export, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 9
    mone = {"keep_ratio": 0.25, "score": "abs_activation"}
    options: dict[str, Any] = {
        "dtype": "float32",
        "load_format": "dummy",
        "max_model_len": 256,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    models = [
        LLM(export, hf_overrides=_SIZES | {"mone": chosen}, **options) for chosen in (mone, None)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=_NEW, ignore_eos=True)
    for batch in (1, 2, 4, 8):
        prompts = [{"prompt_token_ids": list(range(5 + row, 13 + row))} for row in range(batch)]
        ratios, times = [], []
        for turn in range(rounds + 1):
            took = []
            for llm in models:
                started = time.process_time()
                llm.generate(prompts, sampling, use_tqdm=False)
                took.append(time.process_time() - started)
            if turn:  # the first is for warming up
                ratios.append(took[1] / took[0])
                times.append([1e3 * seconds / _NEW for seconds in took])
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            json.dumps(
                {
                    "batch": batch,
                    "times as fast": round(statistics.median(ratios), 2),
                    "from": round(min(ratios), 2),
                    "to": round(max(ratios), 2),
                    "ms a step": [round(ours, 1), round(theirs, 1)],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
