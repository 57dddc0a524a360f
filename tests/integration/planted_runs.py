"""Training runs whose model is damaged before the first step.

    python planted_runs.py JOBS.json

JOBS.json lists objects with ``overrides`` (Hydra), ``port`` (a fresh rendezvous for each) and
``said``, the file for stderr; optionally ``bias``: layer -> expert -> what is added to the choice
of the router; and ``dead``: layer -> expert -> how many of its first neurons have gates of zero.
The trainer itself is the real one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mone_megatron.config.load import compose
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.pretrain import pretrain


def train(job: dict[str, Any]) -> int:
    """The exit code of one run."""
    import torch

    from mone_megatron.mone.layer import MoNELayer
    from mone_megatron.train import run

    build_state = run.build_state

    def damaged(*arguments: Any) -> Any:
        state = build_state(*arguments)
        modules = [module for chunk in state.chunks for module in chunk.modules()]
        layers = {one.layer_number: one for one in modules if isinstance(one, MoNELayer)}
        with torch.no_grad():
            for number, biases in job.get("bias", {}).items():
                for expert, bias in biases.items():
                    layers[int(number)].router.expert_bias[int(expert)] += bias
            for number, counts in job.get("dead", {}).items():
                for expert, count in counts.items():
                    layers[int(number)].experts.gate_up_weight[int(expert), 0, :count] = 0
        state.optimizer.reload_model_params()
        return state

    with patch.object(run, "build_state", damaged):
        return pretrain(compose(job["overrides"]))


def main() -> int:
    """Run all jobs; the exit code of the first that fails."""
    # Before megatron-core is imported; see mone_megatron.pretrain.
    install_cpu_backend()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        with Path(job["said"]).open("w") as said:
            sys.stderr.flush()
            os.dup2(said.fileno(), 2)
            code = train(job)
            sys.stderr.flush()
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
