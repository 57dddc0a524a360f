"""``parallel.overlap_param_gather`` changes when weights are gathered, and nothing else.

It is for CUDA streams; here its collectives run over gloo, past the check that refuses it on a CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mone_megatron.config.checks import hardware
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches
from mone_megatron.train.resume.saved_state import model_state

Weights = dict[str, torch.Tensor]


def _trained(overrides: list[str], dtype: torch.dtype, *, overlap: bool) -> tuple[Weights, float]:
    """Returns this rank's weights as a save after two steps reads them, and the third loss."""
    overlaps = [f"parallel.overlap_{what}={str(overlap).lower()}" for what in
                ("grad_reduce", "param_gather")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "_overlaps", lambda config, resources: iter(()))
        trainer = build_trainer(
            ["experiment=tiny_mone", "optim.warmup_steps=0", "optim.lr=0.01", *overrides,
             *overlaps],
            data_fingerprint="random tokens",
            dtype=dtype,
        )  # fmt: skip
    batches = random_batches(trainer)
    for _ in range(2):
        trainer.stepper.train(batches)
    weights = {
        entry.key: entry.data.clone()
        for entry in nested_values(model_state(trainer.chunks))
        if isinstance(entry, ShardedTensor)
    }
    evaluated = trainer.stepper.evaluate(iter(batches), 1)
    assert evaluated == pytest.approx(trainer.stepper.train(batches).loss, rel=1e-2)
    dist.barrier()
    return weights, evaluated


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], torch.float32),
        ([], torch.bfloat16),
        (["parallel.expert=2"], torch.float32),
        (["parallel.tensor=2", "parallel.expert=2"], torch.bfloat16),
    ],
)
def test_what_a_save_reads_is_what_the_last_step_made(
    four_processes: Processes, overrides: list[str], dtype: torch.dtype
) -> None:
    waited = four_processes.run(_trained, overrides, dtype, overlap=False)
    beside = four_processes.run(_trained, overrides, dtype, overlap=True)
    for (expected, loss), (weights, other) in zip(waited, beside, strict=True):
        assert other == loss
        assert weights.keys() == expected.keys()
        differing = [name for name in weights if not torch.equal(weights[name], expected[name])]
        assert differing == []
