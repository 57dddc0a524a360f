"""Lists the parameters of one rank, and lays them out in gradient buffers as megatron-core does.

It copies the arithmetic of megatron-core 0.16.1 (``distributed/param_and_grad_buffer.py`` and
``optimizer/distrib_optimizer.py``); ``tests/planning`` holds it to real buffers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config, ModelConfig
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.planning import attention
from mone_megatron.planning.layout import Place, experts_are_dense_like
from mone_megatron.planning.parameters import product_key_layer

# A parameter starts at a multiple of so many elements, a bucket ends at one of the other.
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
# Elements of a bucket, when gradients are reduced while the backward pass runs.
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_DATA_RANK = 1_000_000


@dataclass(frozen=True)
class LocalParameter:
    """Describes one parameter as a rank holds it."""

    name: str
    elements: int
    # Reduced over the expert-data-parallel ranks rather than the data-parallel ones.
    expert: bool = False
    # A copy of the embedding that two pipeline stages share has a bucket for itself.
    own_bucket: bool = False

    @property
    def is_matrix(self) -> bool:
        """Returns whether it is a projection, and neither a vector nor a table of tokens."""
        last = self.name.rpartition(".")[2]
        vector = last.endswith("norm") or last.isdigit() or last in ("bias", "softmax_offset")
        return not vector and last not in ("embedding", "output_layer")


def layers_of_chunk(model: ModelConfig, stages: int, chunks: int, stage: int, chunk: int) -> range:
    """Returns the layers (from 0) of one model chunk of one pipeline stage."""
    size = model.num_layers // (stages * chunks)
    first = chunk * (model.num_layers // chunks) + stage * size
    return range(first, first + size)


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Returns whether a layer (from 0) has experts."""
    return model.num_experts > 0 and layer >= model.first_dense_layers


def layer_kinds(config: Config, stage: int, chunk: int) -> Counter[bool]:
    """Returns how many layers of a model chunk are MoE (True) and how many dense (False)."""
    parallel = config.parallel
    layers = layers_of_chunk(
        config.model, parallel.pipeline, parallel.virtual_pipeline, stage, chunk
    )
    return Counter(is_moe_layer(config.model, layer) for layer in layers)


def prediction_kinds(config: Config, stage: int) -> Counter[bool]:
    """Returns how many layers of multi-token prediction a pipeline stage has, by kind likewise."""
    model, last = config.model, config.parallel.pipeline - 1
    return Counter({model.num_experts > 0: model.mtp.depth if stage == last else 0})


def chunk_parameters(
    config: Config, vocab_size: int, stage: int, chunk: int
) -> list[LocalParameter]:
    """Returns what one model chunk of a pipeline stage holds on a rank, in the order of its
    modules.

    All ranks of a stage hold as much: whatever is split is split evenly.
    """
    model, parallel = config.model, config.parallel
    hidden, tensor, stages = model.hidden_size, parallel.tensor, parallel.pipeline
    vocabulary = model.padded_vocab_size(vocab_size) // tensor * hidden
    first = stage == 0 and chunk == 0
    last = stage == stages - 1 and chunk == parallel.virtual_pipeline - 1
    shared = model.tie_embeddings and stages > 1
    # Multi-token prediction reads the embedding on the last stage, too.
    copied = model.mtp.depth > 0 and stages > 1
    found: list[LocalParameter] = []
    if first or (last and copied):
        found.append(LocalParameter("embedding", vocabulary, own_bucket=shared or copied))
    for layer in layers_of_chunk(model, stages, parallel.virtual_pipeline, stage, chunk):
        found += _layer(config, layer)
    if last:
        found.append(LocalParameter("final_layernorm", hidden))
        for depth in range(model.mtp.depth):
            found += _prediction(config, depth)
        if shared or not model.tie_embeddings:
            found.append(LocalParameter("output_layer", vocabulary, own_bucket=shared))
    return found


def _prediction(config: Config, depth: int) -> list[LocalParameter]:
    """Returns the parameters of one layer of multi-token prediction, from 0."""
    hidden = config.model.hidden_size
    joined = 2 * hidden * hidden // config.parallel.tensor
    sizes = {"enorm": hidden, "hnorm": hidden, "eh_proj": joined}
    return [
        *(LocalParameter(f"mtp.{depth}.{name}", size) for name, size in sizes.items()),
        *_layer(config, config.model.num_layers + depth),
        LocalParameter(f"mtp.{depth}.final_layernorm", hidden),
    ]


def _layer(config: Config, layer: int) -> list[LocalParameter]:
    model, tensor = config.model, config.parallel.tensor
    hidden = model.hidden_size
    sizes = {"input_layernorm": hidden}
    if heads := attention.sinks(model):
        sizes["core_attention.softmax_offset"] = heads // tensor
    for matrix in attention.projections(model):
        ways = tensor if matrix.split else 1
        sizes[matrix.name] = matrix.inputs * matrix.outputs // ways
        if matrix.bias:
            sizes[f"{matrix.name}.bias"] = matrix.outputs // ways
    for norm in attention.norms(model):
        sizes[norm.name] = norm.width // (tensor if norm.split else 1)
    sizes["pre_mlp_layernorm"] = hidden
    if model.experts == "product_key":
        sizes |= product_key_layer(model).weights
        return [LocalParameter(f"{layer}.{name}", size) for name, size in sizes.items()]
    if not is_moe_layer(model, layer):
        width = model.dense_ffn_hidden_size // tensor
        sizes |= {"linear_fc1": 2 * width * hidden, "linear_fc2": width * hidden}
        return [LocalParameter(f"{layer}.{name}", size) for name, size in sizes.items()]
    router = ROUTERS[model.router.kind].weights(model.router_settings)
    sizes |= {f"router.{name}": math.prod(weight.shape) for name, weight in router.items()}
    found = [LocalParameter(f"{layer}.{name}", size) for name, size in sizes.items()]
    expert = not experts_are_dense_like(config.parallel)
    weights = local_experts(config) * expert_width(config) * hidden
    for name, weight in GATES[model.gate].weights(model.gate_size).items():
        size = local_experts(config) * weight.parameters // config.parallel.expert_tensor
        found.append(LocalParameter(f"{layer}.experts.{name}", size, expert))
    found.append(LocalParameter(f"{layer}.experts.down", weights, expert))
    if model.shared_expert_ffn_hidden_size:
        width = model.shared_expert_ffn_hidden_size // tensor
        if model.shared_expert_gate:
            found.append(LocalParameter(f"{layer}.shared.gate", hidden))
        found.append(LocalParameter(f"{layer}.shared.fc1", 2 * width * hidden))
        found.append(LocalParameter(f"{layer}.shared.fc2", width * hidden))
    return found


def local_experts(config: Config) -> int:
    """Returns the number of experts of one rank, in each layer."""
    return config.model.num_experts // config.parallel.expert


def expert_width(config: Config) -> int:
    """Returns the number of neurons of one expert on one rank."""
    return config.model.expert_ffn_hidden_size // config.parallel.expert_tensor


@dataclass(frozen=True)
class Buffer:
    """Describes one contiguous buffer of parameters and their gradients, sharded over ``ranks``."""

    ranks: int
    # Elements of all parameters, and with the padding between and behind them.
    elements: int
    padded: int
    # What is reduced in one collective.
    buckets: int
    # Of `padded`, what is no parameter, by the rank whose shard it lies in.
    padding_of_rank: dict[int, int]

    def shard(self, rank: int) -> int:
        """Returns the elements of parameters in one rank's shard: what it keeps masters and moments
        of.
        """
        return self.padded // self.ranks - self.padding_of_rank.get(rank, 0)


def lay_out(
    parameters: list[LocalParameter], ranks: int, *, bucket_size: int | None, padded: bool
) -> Buffer:
    """Lays ``parameters`` out as megatron-core does, from the last to the first.

    Args:
        parameters: the dense or the expert parameters of one model chunk.
        ranks: the number of ranks over which the buffer is sharded.
        bucket_size: elements after which a bucket is closed; None for a single bucket.
        padded: whether to align parameters and buckets, as the distributed optimizer needs.
    """
    elements = sum(parameter.elements for parameter in parameters)
    buckets: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    bucket_start = position = 0

    parameter_step = _PARAMETER_ALIGNMENT if padded else 1
    bucket_step = math.lcm(ranks, _BUCKET_ALIGNMENT) if padded else 1

    def close_bucket() -> None:
        nonlocal bucket_start, position
        end = _round_up(position, bucket_step)
        gaps.append((position, end))
        buckets.append((bucket_start, end))
        bucket_start = position = end

    for parameter in reversed(parameters):
        start = _round_up(position, parameter_step)
        own_bucket = parameter.own_bucket and padded
        if own_bucket and position > bucket_start:
            # The alignment belongs to the bucket that ends here.
            gaps.append((position, start))
            position = start
            close_bucket()
            start = position
        gaps.append((position, start))
        position = start + parameter.elements
        full = bucket_size is not None and position - bucket_start >= bucket_size
        if full or own_bucket:
            close_bucket()
    if position > bucket_start:
        close_bucket()
    padding = _padding_of_rank(buckets, gaps, ranks) if padded else {}
    return Buffer(ranks, elements, position, len(buckets), padding)


def _padding_of_rank(
    buckets: list[tuple[int, int]], gaps: list[tuple[int, int]], ranks: int
) -> dict[int, int]:
    """Returns the elements of padding in each rank's shard. Every bucket is cut into ``ranks``
    equal shards; gaps fall into one or several of them.
    """
    found: dict[int, int] = defaultdict(int)
    bucket = iter(buckets)
    start, end = next(bucket, (0, 0))
    for first, last in gaps:
        while first >= end and first < last:
            start, end = next(bucket)
        shard = (end - start) // ranks
        while first < last:
            rank = (first - start) // shard
            stop = min(last, start + (rank + 1) * shard)
            found[rank] += stop - first
            first = stop
    return dict(found)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class StateBytes:
    """Holds the bytes of one rank that live as long as the run."""

    weights: int
    gradients: int
    # fp32 copies of weights that are not fp32.
    masters: int
    # Adam's two, fp32.
    moments: int

    @property
    def total(self) -> int:
        """Returns the sum of all of them."""
        return self.weights + self.gradients + self.masters + self.moments


@dataclass(frozen=True)
class StageState:
    """Holds the buffers of one pipeline stage; all its ranks have the same, and shards of their
    own.
    """

    dense: tuple[Buffer, ...]
    experts: tuple[Buffer, ...]
    largest_parameter: int
    weight_bytes: int
    sharded: bool
    # How many fp32 tensors the optimizer keeps for each parameter.
    moments: int
    # Elements of them that are not kept (of matrices, by some optimizers).
    spared: int

    def of(self, place: Place, contexts: int) -> StateBytes:
        """Returns what the rank at ``place`` holds; ``contexts`` is the context-parallel size."""
        buffers = [(buffer, place.data * contexts + place.context) for buffer in self.dense]
        buffers += [(buffer, place.expert_data) for buffer in self.experts]
        padded = sum(buffer.padded for buffer, _ in buffers)
        optimized = sum(
            buffer.shard(rank) if self.sharded else buffer.elements for buffer, rank in buffers
        )
        return StateBytes(
            weights=self.weight_bytes * padded,
            gradients=4 * padded,
            masters=0 if self.weight_bytes == 4 else 4 * optimized,
            moments=4 * (self.moments * optimized - self.spared),
        )

    @property
    def dense_elements(self) -> int:
        """Returns the elements of the dense buffers, padding included."""
        return sum(buffer.padded for buffer in self.dense)

    @property
    def expert_elements(self) -> int:
        """Returns the elements of the expert buffers, padding included."""
        return sum(buffer.padded for buffer in self.experts)


def stage_state(
    config: Config, layout: Layout, vocab_size: int, stage: int, *, weight_bytes: int
) -> StageState:
    """Lays out everything that a pipeline stage trains.

    Args:
        config: the configuration, validated.
        layout: what its validation returned.
        vocab_size: the true size of the vocabulary.
        stage: the pipeline stage, from 0.
        weight_bytes: bytes of one weight: 2 for bf16, 4 for fp32.
    """
    parallel = config.parallel
    sharded = parallel.distributed_optimizer
    dense: list[Buffer] = []
    experts: list[Buffer] = []
    largest = matrices = 0
    for chunk in range(parallel.virtual_pipeline):
        parameters = chunk_parameters(config, vocab_size, stage, chunk)
        largest = max([largest, *(parameter.elements for parameter in parameters)])
        matrices += sum(parameter.elements for parameter in parameters if parameter.is_matrix)
        # Only the first stage's first chunk is reduced in several buckets: the others' gradients
        # are ready early.
        bucket_size = None
        if parallel.overlap_grad_reduce and stage == 0 and chunk == 0:
            bucket_size = max(_SMALLEST_BUCKET, _BUCKET_PER_DATA_RANK * layout.data)
        for buffers, ranks, expert in (
            (dense, layout.data * parallel.context, False),
            (experts, layout.expert_data, True),
        ):
            chosen = [parameter for parameter in parameters if parameter.expert == expert]
            if chosen:
                buffers.append(lay_out(chosen, ranks, bucket_size=bucket_size, padded=sharded))
    optimizer = OPTIMIZERS[config.optim.name]
    moments, of_matrices = len(optimizer.moments), optimizer.matrix_moments
    fewer = 0 if of_matrices is None else moments - len(of_matrices)
    return StageState(
        tuple(dense), tuple(experts), largest, weight_bytes, sharded, moments, fewer * matrices
    )
