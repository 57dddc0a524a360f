"""Plans one experiment in one layout on one kind of GPU: everything that is known before a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.layout import Layout, smallest_world_size
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.counting import counted
from mone_megatron.methods.sources import SOURCES
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.communication import Traffic, stage_traffic
from mone_megatron.planning.flops import Flops, flops_per_step
from mone_megatron.planning.hardware import GPU, Assumptions
from mone_megatron.planning.layout import Group, groups
from mone_megatron.planning.memory import RankMemory, rank_memory, stage_memory, worst_of_stages
from mone_megatron.planning.parameters import ParameterCount, count_parameters
from mone_megatron.planning.prediction import StepTime, predict
from mone_megatron.planning.unmodelled import unmodelled

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Describes what a run is planned for."""

    gpu: GPU
    gpus: int
    gpus_per_node: int = 8
    assumed: Assumptions = field(default_factory=Assumptions)
    # Optional packages of the machines: "transformer_engine", "deep_ep".
    installed: frozenset[str] = frozenset()

    def check(self) -> None:
        """Checks that the numbers of GPUs and the assumptions are possible ones.

        Raises:
            ValueError: naming the flag.
        """
        if self.gpus < 1:
            raise ValueError(f"--gpus: {self.gpus} is too few; use 1 or more")
        if self.gpus_per_node < 1:
            raise ValueError(f"--gpus-per-node: {self.gpus_per_node} is too few; use 1 or more")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            near = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise ValueError(
                f"--gpus: {self.gpus} does not fill nodes of --gpus-per-node "
                f"{self.gpus_per_node}; use {near} or {near + self.gpus_per_node}"
            )
        self.assumed.check()

    @property
    def nodes(self) -> int:
        """Returns the number of nodes of the run."""
        return max(1, self.gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Plan:
    """Holds what :func:`make_plan` counts and predicts. Everything under "predicted" is arithmetic,
    not validated on GPUs.
    """

    config: Config
    machine: Machine
    layout: Layout
    vocab_size: int
    numerics: Numerics
    parameters: ParameterCount
    # Elements that the padding of the vocabulary adds to them in memory.
    vocabulary_padding: int
    # The worst rank of each pipeline stage.
    stages: tuple[RankMemory, ...]
    traffic: tuple[Traffic, ...]
    flops: Flops
    # Predicted.
    time: StepTime

    @property
    def worst(self) -> RankMemory:
        """Returns the rank that needs the most memory."""
        return max(self.stages, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Returns whether the GPU has the memory that the worst rank needs."""
        return self.worst.total <= self.machine.gpu.memory

    @property
    def tokens_per_step(self) -> int:
        """Returns the tokens of a step over all processes."""
        return self.config.train.global_batch_size * self.config.train.seq_length

    @property
    def tokens(self) -> int:
        """Returns the tokens of the whole run."""
        return self.tokens_per_step * self.config.train.steps

    @property
    def hours(self) -> float:
        """Returns the predicted hours of the whole run without evaluation, saves and stops."""
        return self.time.total * self.config.train.steps / 3600

    @property
    def gpu_hours(self) -> float:
        """Returns the predicted GPU-hours of the whole run."""
        return self.hours * self.machine.gpus

    def mfu(self, operations: int) -> float:
        """Returns the predicted share of the GPUs' peak, counting ``operations`` a step."""
        peak = self.machine.gpu.bf16_flops * self.machine.gpus
        return operations / (self.time.total * peak)


def vocabulary_of(config: Config) -> int:
    """Returns the vocabulary's size: the model's, or that of the corpus's tokenizer."""
    return config.model.vocab_size or config.data.vocab_size


def check_config(config: Config, machine: Machine) -> Layout:
    """Validates ``config`` on ``machine`` and returns its layout there.

    Raises:
        ConfigError: naming every problem at once.
    """
    machine.check()
    if config.device.kind == "cpu":
        raise ConfigError("device.kind: cpu has no GPU to plan for; use device=cuda")
    local = min(machine.gpus, machine.gpus_per_node)
    return validate(
        config,
        world_size=machine.gpus,
        num_devices=local,
        local_world_size=local,
        have_transformer_engine="transformer_engine" in machine.installed,
        have_deep_ep="deep_ep" in machine.installed,
    )


def numerics_of(
    config: Config, assumed: Assumptions, installed: frozenset[str] = frozenset()
) -> Numerics:
    """Returns the kernels and the dtype that run on a GPU with these optional packages."""
    size = 4 if config.device.dtype == "fp32" else 2
    own = config.data.reset_attention or "transformer_engine" not in installed
    return Numerics("cuda", size, imbalance=assumed.imbalance, own_attention=own)


def make_plan(config: Config, machine: Machine, *, rough: bool = False) -> Plan:
    """Counts and predicts what a run needs and takes.

    Args:
        config: the configuration of the run.
        machine: what it is to run on.
        rough: whether to look only at the first and last pipeline stage, and at one rank of each:
            what a search needs. State bytes may then be off by the padding of a shard.

    Raises:
        ConfigError: for a config that cannot run there.
        ValueError: for a machine that cannot be.
    """
    layout = check_config(config, machine)
    vocab_size = vocabulary_of(config)
    numerics = numerics_of(config, machine.assumed, machine.installed)
    reserve = int(machine.assumed.reserve)
    if rough:
        size = layout.world_size // config.parallel.pipeline
        ends = sorted({0, config.parallel.pipeline - 1})
        stages = [
            rank_memory(
                stage_memory(config, layout, vocab_size, stage, numerics),
                stage * size,
                config.parallel,
                layout,
                reserve=reserve,
            )
            for stage in ends
        ]
    else:
        stages = worst_of_stages(config, layout, vocab_size, numerics, reserve=reserve)
    worst = max(stages, key=lambda rank: rank.total)
    parameters = count_parameters(config.model, config.mone, vocab_size)
    allocated = count_parameters(config.model, config.mone, vocab_size, padded=True)
    traffic = stage_traffic(config, layout, worst.stage.state, worst.stage.stage, numerics)
    return Plan(
        config=config,
        machine=machine,
        layout=layout,
        vocab_size=vocab_size,
        numerics=numerics,
        parameters=parameters,
        vocabulary_padding=allocated.total - parameters.total,
        stages=tuple(stages),
        traffic=tuple(traffic),
        flops=flops_per_step(config, vocab_size),
        time=predict(
            config,
            layout,
            vocab_size,
            [rank.stage for rank in stages],
            gpu=machine.gpu,
            assumed=machine.assumed,
            numerics=numerics,
            gpus_per_node=machine.gpus_per_node,
        ),
    )


def problems(plan: Plan) -> list[str]:
    """Returns what stops the run although its configuration is valid, one line each."""
    if plan.fits:
        return []
    gpu, worst = plan.machine.gpu, plan.worst
    return [
        f"memory: rank {worst.rank} needs {worst.total / GIB:.1f} GiB and an {gpu.name} has "
        f"{gpu.memory / GIB:.1f}; {_fix(plan)}"
    ]


def _fix(plan: Plan) -> str:
    """Returns the nearest change that fits, as advice."""
    train = plan.config.train
    changes: list[tuple[str, Config]] = []
    for recompute in ("selective", "full"):
        if recompute != train.recompute and train.recompute != "full":
            changed = replace(train, recompute=recompute)
            changes.append((f"train.recompute={recompute}", replace(plan.config, train=changed)))
    micro = train.micro_batch_size
    while micro > 1:
        micro //= 2
        changed = replace(train, micro_batch_size=micro)
        changes.append((f"train.micro_batch_size={micro}", replace(plan.config, train=changed)))
        changed = replace(changed, recompute="full")
        text = f"train.micro_batch_size={micro} train.recompute=full"
        changes.append((text, replace(plan.config, train=changed)))
    for text, config in changes:
        if _would_fit(config, plan.machine):
            return f"use {text}"
    gpus = plan.machine.gpus
    while gpus < 64 * plan.machine.gpus:
        gpus *= 2
        if _would_fit(plan.config, replace(plan.machine, gpus=gpus)):
            return f"use {counted(gpus, 'GPU')}"
    return "use more parallel.expert, parallel.pipeline or parallel.tensor (see --search)"


def _would_fit(config: Config, machine: Machine) -> bool:
    try:
        return make_plan(config, machine, rough=True).fits
    except ValueError:
        return False


def notes(plan: Plan) -> list[str]:
    """Returns what is worth a second look, one line each."""
    config, machine = plan.config, plan.machine
    found: list[str] = []
    named = groups(config.parallel, plan.layout)
    for name in ("tensor", "expert_tensor", "expert"):
        group: Group = named[name]
        inside = group.in_node(machine.gpus_per_node)
        if group.size > inside:
            found.append(
                f"parallel.{name}: {group.size} ranks lie on several nodes of "
                f"{machine.gpus_per_node} GPUs, {inside} on each; {inside} would stay inside"
            )
    microbatches, stages = plan.layout.num_microbatches, config.parallel.pipeline
    if stages > 1 and microbatches < 4 * stages:
        found.append(
            f"train.global_batch_size: {counted(microbatches, 'microbatch')} for {stages} "
            "pipeline stages leave them idle for "
            f"{plan.time.pipeline_bubble / plan.time.total:.0%} of a step"
        )
    if plan.numerics.bytes == 4:
        found.append(
            "device.dtype: fp32 products are several times slower than the bf16 ones whose peak is "
            "taken; time, MFU and cost are too good"
        )
    found += [
        f"{key}: not modelled; the plan is that of a run without it" for key in unmodelled(config)
    ]
    if SOURCES[config.data.source].reads_paths:
        found += [
            f"data.paths: {path}.bin is not on this machine; it must be on the cluster"
            for path in config.data.paths
            if not Path(f"{path}.bin").exists()
        ]
    return found


def default_gpus(config: Config) -> int:
    """Returns the fewest GPUs that the layout runs on."""
    return smallest_world_size(config.parallel)
