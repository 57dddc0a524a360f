"""Compiles for a GPU what the plugin launches on CUDA, by Triton's own compiler, without a GPU.

Every launch becomes a compilation with its true arguments, for sm_90; nothing runs. Prints JSON:
the kernels, with the constants of each launch.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from mone_vllm import selection
from mone_vllm.definition.kernels import fused
from mone_vllm.definition.methods.activations import ACTIVATIONS
from mone_vllm.definition.methods.rules import RULES
from mone_vllm.definition.methods.scores import SCORES
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# H100 and H200.
_TARGET = GPUTarget("cuda", 90, 32)
_NEURONS = 128
# Names of constants that tell launches of one kernel apart.
_TELLING = ("KEEP", "SCORE", "SIGNED", "NARROW", "ACTIVATION")


class _NoDevice:
    """Stands for the device that code is compiled for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return _TARGET


def compile_launches(compiled: set[str]) -> None:
    """Makes every launch in this process a compilation, which is noted."""
    driver.set_active(_NoDevice())
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        assert kernel.asm["cubin"], self.fn.__name__
        given = {name: named[name] for name in _TELLING if name in named}
        told = {name: getattr(value, "__name__", value) for name, value in given.items()}
        compiled.add(f"{self.fn.__name__} {json.dumps(told)}")

    JITFunction.run = compile_only


def main() -> None:
    """Asks for the hidden values of rows by every rule, score and activation that is served."""
    compiled: set[str] = set()
    compile_launches(compiled)
    selection.on_triton = lambda tensor: True
    # Whether the kernels' bf16 activations are torch's is asked of the device, which is not there.
    fused.scores_equal_torch = lambda activate, device: True
    state = {name: torch.ones(1) for rule in RULES for name in rule.state}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        gate_up = torch.zeros(2, 2 * _NEURONS, dtype=dtype)
        for activation in ACTIVATIONS:
            if activation.up is not None:
                continue
            activate = selection.activation_of(activation.name)
            for rule in RULES:
                if not rule.causal or rule.pools:
                    continue
                # Rules that are given scores launch the same kernels whatever they are of.
                for score in SCORES if rule.top_k else [SCORES["abs_gate"]]:
                    mone = {"keep_ratio": 0.25, "rule": rule.name, "score": score.name}
                    chosen = selection.Selection.of(mone, "routed", _NEURONS, activate, None)
                    norm = torch.ones(_NEURONS)
                    chosen.hidden(gate_up, down_norm_TF=norm, state=state)
    print(json.dumps(sorted(compiled)))


if __name__ == "__main__":
    main()
