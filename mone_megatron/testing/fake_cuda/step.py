"""Runs training steps of the real model on a CUDA device that is not there.

    python -m mone_megatron.testing.fake_cuda.step RANK WORLD key=value ... [--json FILE]

The second step is the one to look at. A third counts what experts do; then come one evaluation,
the check of the state before a save, what a save reads, and a step after a resume.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

# megatron-core's compiled functions run as they are.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from mone_megatron.testing.fake_cuda.guard import load_guard

load_guard()  # before torch

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from mone_megatron.config.layout import Layout  # noqa: E402
from mone_megatron.config.load import compose  # noqa: E402
from mone_megatron.config.schema import Config  # noqa: E402
from mone_megatron.config.validate import validate  # noqa: E402
from mone_megatron.parallel.world import World  # noqa: E402
from mone_megatron.testing.fake_cuda.device import GPUS, install_device  # noqa: E402
from mone_megatron.testing.fake_cuda.findings import WAIT, Findings  # noqa: E402
from mone_megatron.testing.fake_cuda.launches import check_launches, variants  # noqa: E402
from mone_megatron.testing.fake_cuda.watch import (  # noqa: E402
    COPY,
    FAULT,
    Routing,
    WatchFunctions,
    WatchOperations,
    on_gpu,
)

STEP, PANEL_STEP = "step", "panel step"


_ONE_STEP = ("train.steps=1", "train.eval_interval=0", "logging.layer_interval=0",
             "optim.warmup_steps=0")  # fmt: skip


class _Counts:
    """Holds numbers on the host that stand for a tensor of row counts."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def ravel(self) -> _Counts:
        return self

    @property
    def T(self) -> _Counts:
        return self

    def tolist(self) -> list[int]:
        return list(self.values)


def _evenly(parts: int, total: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _know_the_counts(findings: Findings, routing: Routing) -> None:
    """Gives megatron-core's dispatcher the host's numbers, which it would copy and wait for."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def moved(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if point == self.cuda_dtoh_point:
            # Also where it was counted, as of a router that varies it.
            self.num_out_tokens = total = routing.tokens * routing.topk
            if self.input_splits is not None:
                self.input_splits = np.array(_evenly(self.ep_size, total))
                self.output_splits = np.array(_evenly(self.ep_size, total))
                self.output_splits_tp = np.array(_evenly(self.tp_size, total * self.tp_size))
            if self.num_local_experts > 1:
                chunks = self.tp_size * self.ep_size * self.num_local_experts
                order = _Counts(list(range(chunks)))
                self.sort_input_by_local_experts = self.restore_output_by_local_experts = order
                rows = _Counts(_evenly(chunks, total * self.tp_size))
                self.num_global_tokens_per_local_expert = rows
            findings.note(COPY, "device to host: the dispatcher's counts, on a stream beside")
            if tokens_per_expert is not None:
                tokens_per_expert = torch.empty(tokens_per_expert.shape, dtype=torch.long)
        if point == self.cuda_sync_point:
            findings.note(WAIT, f"the dispatcher's counts, {point}")
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = moved


def _open_world(findings: Findings, rank: int, world: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    new_group = dist.new_group

    def counted(*args: Any, **options: Any) -> Any:
        findings.groups += 1
        return new_group(*args, **options)

    def gather_objects(object_list: Any, obj: Any, group: Any = None) -> Any:
        object_list[:] = [obj] * len(object_list)

    dist.new_group = counted
    dist.all_gather_object = gather_objects
    dist.barrier = lambda *args, **options: None


def _batches(config: Config, count: int) -> list[dict[str, Tensor]]:
    shape = (config.train.micro_batch_size, config.train.seq_length)
    numbers = dict.fromkeys(("tokens", "labels", "position_ids"), torch.long)
    kinds = numbers | {"loss_mask": torch.float32}
    return [
        {name: torch.zeros(shape, dtype=dtype) for name, dtype in kinds.items()}
        for _ in range(count)
    ]


def run(rank: int, world: int, overrides: list[str]) -> tuple[Findings, dict[str, Any]]:
    """Builds the model and runs steps; returns what was found, and facts about the run.

    Raises:
        ConfigError: when the configuration is not one for ``world`` GPUs.
    """
    findings = Findings()
    install_device(findings)
    _open_world(findings, rank, world)
    config = compose(["device.kind=cuda", *overrides, *_ONE_STEP])
    local = min(world, GPUS)
    layout = validate(config, world_size=world, num_devices=GPUS, local_world_size=local)

    # megatron-core is imported by this, for the device that it now finds.
    from mone_megatron.parallel.device import open_device

    device = open_device(config.device, World(rank, world, rank % local, local))

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **options: torch.zeros(16, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *args, **options: None

    model, train, parallel = config.model, config.train, config.parallel
    shards = parallel.context * (parallel.tensor if layout.sequence_parallel else 1)
    routing = Routing(
        tokens=train.micro_batch_size * train.seq_length // shards,
        topk=model.experts_per_token,
        experts=model.num_experts,
        kept=round(config.mone.keep_ratio * model.expert_ffn_hidden_size) or 1,
    )
    _know_the_counts(findings, routing)
    if _triton_is_there():
        check_launches(findings.launches)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, WatchOperations(findings, routing), WatchFunctions(findings):
        facts = _steps(config, layout, device, findings)
    return findings, {"rank": rank, "world": world, "overrides": overrides} | facts


def _triton_is_there() -> bool:
    from mone_megatron.kernels import ops

    return ops._HAVE_TRITON


def _steps(config: Config, layout: Layout, device: Any, findings: Findings) -> dict[str, Any]:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from mone_megatron.kernels import ops
    from mone_megatron.model import builder
    from mone_megatron.parallel.groups import open_groups
    from mone_megatron.planning.plan import vocabulary_of
    from mone_megatron.train.compile_kernels import compile_kernels
    from mone_megatron.train.hooks.on_every_rank import hooks_on_every_rank
    from mone_megatron.train.hooks.panel import PanelHook
    from mone_megatron.train.loop import train
    from mone_megatron.train.resume.saved_state import (
        assign_optimizer_state,
        inner_parts,
        model_state,
        optimizer_state,
        optimizer_targets,
    )
    from mone_megatron.train.session import Session
    from mone_megatron.train.state import build_state
    from mone_megatron.train.step import Stepper, usual_rows

    # Values, which nothing here has.
    setattr(builder, "initialize_weights", lambda *args, **options: None)  # noqa: B010
    ops.use_kernels(config.device.kernels, config.device.grouped_gemm)
    ops.expect_rows(usual_rows(config), device.torch_device)
    open_groups(config.parallel, config.train, timeout_seconds=300)
    state = build_state(config, layout, device, vocabulary_of(config))
    for chunk in state.chunks:
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if not on_gpu(tensor):
                findings.note(FAULT, f"on the CPU: {name}")
    session = Session(
        config=config,
        layout=layout,
        device=device,
        vocab_size=vocabulary_of(config),
        state=state,
        stepper=(stepper := Stepper(config, layout, device, state)),
        batches_from=lambda step: iter(_batches(config, layout.num_microbatches)),
    )
    session.hooks.extend(hooks_on_every_rank(session))
    findings.phase = "kernels"
    # Also those of steps that count, which this run has some of.
    counting = replace(config, logging=replace(config.logging, layer_interval=1))
    compile_kernels(replace(session, config=counting))
    compiled = variants()
    # The loop as it is; every number that it reads is 1, so that it ends after each step.
    for findings.phase in ("first step", STEP):
        train(session)
    (panel,) = (hook for hook in session.hooks if isinstance(hook, PanelHook))
    findings.phase = PANEL_STEP
    panel.collect(True)
    stepper.attempt(_batches(config, layout.num_microbatches))
    panel.collect(False)
    findings.phase = "panel"
    # What follows the copy to the host is made of numbers, which there are none of.
    with suppress(DynamicOutputShapeException):
        panel.read(1, {})
    findings.phase = "evaluation"
    stepper.evaluate(iter(_batches(config, layout.num_microbatches)), 1)
    findings.phase = "state before a save"
    stepper.state_is_finite()
    findings.phase = "save"
    optimizer_state(state.optimizer, model_state(state.chunks))
    findings.phase = "resume"
    entries, owners = optimizer_targets(state.optimizer, model_state(state.chunks))
    loaded = {name: entry.data for name, entry in entries.items()}
    assign_optimizer_state(loaded, owners, updates=3)
    stepper.attempt(_batches(config, layout.num_microbatches))
    return {
        "dtype": str(device.dtype),
        "compiled_before": len(compiled),
        "compiled_later": sorted(set(variants()) - set(compiled)),
        "microbatches": layout.num_microbatches,
        "moe_layers": sum(
            isinstance(module, MoELayer) for chunk in state.chunks for module in chunk.modules()
        ),
        "optimizers": [
            {"class": type(part.optimizer).__name__}
            | {key: part.param_groups[0].get(key) for key in ("fused", "foreach")}
            for part in inner_parts(state.optimizer)
        ],
    }


def _show(findings: Findings, facts: dict[str, Any]) -> None:
    print(json.dumps(facts))
    print(f"{findings.groups} process groups")
    for phase, found in findings.found.items():
        waits = sum(count for finding, count in found.items() if finding.kind == WAIT)
        print(f"{phase}: the host waits {waits} times")
        for finding, count in found.most_common():
            line = f"  {count:>4} x {finding.kind:<6} {finding.what:<60} {finding.place}"
            print(line if finding.by_us else f"{line}  <- {finding.ours}")
    print("collectives of a step:")
    for name, count in findings.collectives[STEP].most_common():
        print(f"  {count:>4} x {name}")
    print("launches of all steps:")
    for name, count in findings.launches.most_common():
        print(f"  {count:>4} x {name}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rank", type=int)
    parser.add_argument("world", type=int)
    parser.add_argument("overrides", nargs="*", help="key=value, as of a run")
    parser.add_argument("--json", type=Path, help="write everything there, and print nothing")
    options = parser.parse_args(arguments)
    findings, facts = run(options.rank, options.world, options.overrides)
    if options.json is None:
        _show(findings, facts)
    else:
        written = json.dumps(facts | findings.as_json(), default=str)
        options.json.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
