"""Predicts step time on a named GPU: arithmetic on published figures and assumptions.

The time of a microbatch on the slowest pipeline stage is the sum of its matrix products, of the
memory traffic of everything else, and of communication that nothing hides. Microbatches follow one
another in the pipeline with its bubble; then come what is left of the data-parallel communication
and the optimizer. None of this has been validated on GPUs here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.planning import activations
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.attention import projection_flops, score_flops
from mone_megatron.planning.communication import Traffic, stage_traffic
from mone_megatron.planning.hardware import GPU, Assumptions
from mone_megatron.planning.layout import Group
from mone_megatron.planning.memory import StageMemory
from mone_megatron.planning.shards import expert_width, layer_kinds, prediction_kinds

_FORWARD_AND_BACKWARD = 3
# Bytes an element of torch's foreach AdamW: gradient, master, moments, denominators, weight.
_OPTIMIZER_BYTES = 60
# Bytes a gradient: set to zero, and read for the norm.
_GRADIENT_BYTES = 8


@dataclass(frozen=True)
class Work:
    """Holds the forward operations of one microbatch on one rank, by the kind of kernel."""

    matmul: float = 0.0
    attention: float = 0.0
    grouped: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.grouped + other.grouped,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.matmul * times, self.attention * times, self.grouped * times)

    @property
    def total(self) -> float:
        """Returns the number of all operations."""
        return self.matmul + self.attention + self.grouped

    def seconds(self, gpu: GPU, assumed: Assumptions) -> float:
        """Returns how many seconds they take."""
        return (
            self.matmul / assumed.matmul
            + self.attention / assumed.attention
            + self.grouped / assumed.grouped
        ) / gpu.bf16_flops


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of one step, by what they are spent on."""

    matrix_products: float
    memory_traffic: float
    tensor_communication: float
    expert_communication: float
    pipeline_sends: float
    pipeline_bubble: float
    data_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Returns the seconds of the whole step."""
        return (
            self.matrix_products
            + self.memory_traffic
            + self.tensor_communication
            + self.expert_communication
            + self.pipeline_sends
            + self.pipeline_bubble
            + self.data_communication
            + self.optimizer
        )


def layer_work(config: Config, *, moe: bool) -> tuple[Work, Work]:
    """Returns a layer's forward operations on one rank, and those of them that are recomputed."""
    model, tensor = config.model, config.parallel.tensor
    tokens, hidden = activations.tokens_of_rank(config), model.hidden_size
    # MLA's down projections are whole on every rank, which runs them for its part of the tokens.
    projections = Work(matmul=tokens * projection_flops(model) / tensor)
    # Of a layer in the mean, where some attend within a window.
    scores = score_flops(model, config.train.seq_length) / model.num_layers
    attention = Work(attention=tokens * scores / tensor)
    if moe:
        gates = model.num_experts + (1 if model.shared_expert_gate else 0)
        mlp = Work(
            matmul=tokens * hidden * (2 * gates + 6 * model.shared_expert_ffn_hidden_size) / tensor,
            grouped=activations.expert_rows(config) * 6.0 * hidden * expert_width(config),
        )
        mlp_again = config.train.recompute != "none"
    else:
        mlp = Work(matmul=tokens * 6 * hidden * model.dense_ffn_hidden_size / tensor)
        mlp_again = config.train.recompute == "full" or (
            config.train.recompute == "selective" and model.num_experts == 0
        )
    again = Work()
    if config.train.recompute == "full":
        again += projections
    if config.train.recompute != "none":
        again += attention
    if mlp_again:
        again += mlp
    return projections + attention + mlp, again


def output_work(config: Config, vocab_size: int) -> Work:
    """Returns the operations of the output layer's forward pass on one rank of the last stage."""
    rows = config.model.padded_vocab_size(vocab_size)
    tokens = activations.tokens_of_rank(config)
    return Work(matmul=tokens * 2 * config.model.hidden_size * rows / config.parallel.tensor)


def _joining_work(config: Config) -> Work:
    """Returns the operations of the matrix that joins the embedding of a later token to the layer
    below, in the forward pass of one layer of multi-token prediction on one rank.
    """
    tokens, hidden = activations.tokens_of_rank(config), config.model.hidden_size
    return Work(matmul=tokens * 2 * 2 * hidden * hidden / config.parallel.tensor)


def bandwidth(group: Group, gpu: GPU, gpus_per_node: int, *, ring: bool) -> float:
    """Returns the bytes a second that a rank of ``group`` can send.

    A ring that leaves the node enters it again over another adapter, so every rank of the node
    lends it its own. In an all-to-all each rank sends over its own adapter what is not for ranks of
    its node.
    """
    inside = group.in_node(gpus_per_node)
    if inside == group.size:
        return gpu.nvlink
    if ring:
        return min(gpu.nvlink, gpu.network * inside)
    outside = (group.size - inside) / (group.size - 1)
    return min(gpu.nvlink / max(1 - outside, 1e-9), gpu.network / outside)


def predict(
    config: Config,
    layout: Layout,
    vocab_size: int,
    stages: Sequence[StageMemory],
    *,
    gpu: GPU,
    assumed: Assumptions,
    numerics: Numerics,
    gpus_per_node: int,
) -> StepTime:
    """Predicts the time of one step. ``stages`` are those to look at: all, or the worst."""
    times = [
        _stage_time(config, layout, vocab_size, stage, gpu, assumed, numerics, gpus_per_node)
        for stage in stages
    ]
    return max(times, key=lambda time: time.total)


def _stage_time(
    config: Config,
    layout: Layout,
    vocab_size: int,
    stage: StageMemory,
    gpu: GPU,
    assumed: Assumptions,
    numerics: Numerics,
    gpus_per_node: int,
) -> StepTime:
    parallel, microbatches = config.parallel, layout.num_microbatches
    work, traffic = _microbatch(config, vocab_size, stage.stage, numerics, assumed)
    products = work.seconds(gpu, assumed)
    memory = traffic / (gpu.memory_bandwidth * assumed.memory)
    seconds: defaultdict[str, float] = defaultdict(float)
    for item in stage_traffic(config, layout, stage.state, stage.stage, numerics):
        ring = item.operation not in ("all-to-all", "send")
        speed = bandwidth(item.group, gpu, gpus_per_node, ring=ring) * assumed.links
        seconds[_kind(item)] += item.bytes / speed
    assert set(seconds) <= {"tensor", "expert", "pipeline", "gradient", "parameter"}, seconds
    tensor, expert, sends = seconds["tensor"], seconds["expert"], seconds["pipeline"]
    microbatch = products + memory + tensor + expert + sends
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * microbatch
    # Overlap hides a reduction behind the last backward pass, a gathering behind the first forward
    # pass, as far as they last.
    hidden = microbatch / _FORWARD_AND_BACKWARD
    reduced = seconds["gradient"] - (2 * hidden if parallel.overlap_grad_reduce else 0.0)
    gathered = seconds["parameter"] - (hidden if parallel.overlap_param_gather else 0.0)
    state = stage.state
    optimized = sum(
        buffer.padded / buffer.ranks if state.sharded else buffer.padded
        for buffer in (*state.dense, *state.experts)
    )
    padded = state.dense_elements + state.expert_elements
    optimizer = (_OPTIMIZER_BYTES * optimized + _GRADIENT_BYTES * padded) / (
        gpu.memory_bandwidth * assumed.memory
    )
    return StepTime(
        matrix_products=microbatches * products,
        memory_traffic=microbatches * memory,
        tensor_communication=microbatches * tensor,
        expert_communication=microbatches * expert,
        pipeline_sends=microbatches * sends,
        pipeline_bubble=bubble,
        data_communication=max(0.0, reduced) + max(0.0, gathered),
        optimizer=optimizer,
    )


def _kind(item: Traffic) -> str:
    if item.once:
        # Also the gradients of weights that every tensor-parallel rank has whole (MLA's).
        return "parameter" if item.operation.startswith("parameter") else "gradient"
    if item.group.name in ("tensor", "context"):
        return "tensor"
    return "pipeline" if item.group.name == "pipeline" else "expert"


def _microbatch(
    config: Config, vocab_size: int, stage: int, numerics: Numerics, assumed: Assumptions
) -> tuple[Work, float]:
    """Returns the operations, backward pass included, and the bytes of memory traffic of one
    microbatch on a rank of ``stage``.
    """
    parallel = config.parallel
    layers: Counter[bool] = Counter()
    for chunk in range(parallel.virtual_pipeline):
        layers += layer_kinds(config, stage, chunk)
    layers += prediction_kinds(config, stage)
    work, traffic = Work(), 0.0
    for moe, count in layers.items():
        forward, again = layer_work(config, moe=moe)
        work += (forward * _FORWARD_AND_BACKWARD + again) * count
        whole = sum(activations.whole_layer(config, numerics, moe=moe).values())
        kept = sum(activations.kept_by_layer(config, numerics, moe=moe).values())
        times = assumed.passes * whole + 2.0 * max(whole - kept, 0)
        if moe:
            times += _selection_traffic(config, numerics)
        traffic += count * times
    # The rank with the most loaded experts holds up the others.
    work = Work(work.matmul, work.attention, work.grouped * assumed.imbalance)
    if stage == parallel.pipeline - 1:
        depth = config.model.mtp.depth
        work += output_work(config, vocab_size) * ((1 + depth) * _FORWARD_AND_BACKWARD)
        work += _joining_work(config) * (depth * _FORWARD_AND_BACKWARD)
        later = activations.prediction(config, numerics, vocab_size)
        traffic += depth * assumed.passes * sum(later.values())
        traffic += assumed.passes * sum(activations.output(config, numerics, vocab_size).values())
    return work, traffic


def _selection_traffic(config: Config, numerics: Numerics) -> float:
    """Returns the bytes that the exact top-k of a layer moves: scores, comparisons and the count of
    ties, each written and read.
    """
    width = config.model.expert_ffn_hidden_size
    if not activations.selects_neurons(config, "routed", width):
        return 0.0
    again = 2 if config.train.recompute != "none" else 1
    rows = activations.expert_rows(config, numerics.imbalance)
    return again * 2.0 * rows * expert_width(config) * (numerics.bytes + 2 + 8)
