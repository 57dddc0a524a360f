"""The configuration as typed data: one dataclass per group under ``conf/``.

Every field is documented on the line above or beside it, and every default is the one a run gets
when neither a YAML file nor the command line says otherwise. Nothing here does work: values are
read from YAML in :mod:`mone_megatron.config.load` and cross-checked in
:mod:`mone_megatron.config.validate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mone_megatron.config.names import NameIn
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.hooks import HOOKS
from mone_megatron.methods.losses import LOSSES
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.methods.sources import SOURCES

# A value of the configuration that stands for itself.
Scalar = str | int | float | bool
MoNETarget = Literal["routed", "shared", "dense"]
QKNormScope = Literal["head", "all_heads"]
RouterBalance = Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    # Shown in logs, reports and W&B.
    name: str = "run"
    # Everything the run writes goes under this folder.
    dir: str = "runs/run"


@dataclass(frozen=True)
class RouterConfig:
    """Expert routing and balancing: megatron-core's own router, configured."""

    # Which router (methods/routers): "topk" is megatron-core's own.
    kind: Annotated[str, NameIn(ROUTERS)] = "topk"
    # Turns logits into expert weights.
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    # Softmax over all experts before the top-k (True) or over the chosen ones after it (False).
    pre_softmax: bool = False
    # Balance losses, several at once if wanted; each with the coefficient at the same place.
    balance: tuple[RouterBalance, ...] = ("aux_loss",)
    balance_coeff: tuple[float, ...] = (0.01,)
    # ST-MoE z-loss coefficient; 0 turns it off.
    z_loss_coeff: float = 0.0
    # Aux-loss-free balancing (DeepSeek-V3): a bias per expert, moved by `expert_bias_rate` a step.
    expert_bias: bool = False
    expert_bias_rate: float = 1e-3
    # Precision of the routing computation.
    dtype: Literal["fp32", "fp64", "model"] = "fp32"
    # Group-limited routing: 0 turns it off. megatron-core's (and DeepSeek-V3's) ranks a group by
    # the sum of its best experts_per_token / group_topk experts; DeepSeek-V2's, by its best
    # expert, is the same only where that is 1.
    num_groups: int = 0
    group_topk: int = 0
    # Multiplies the routing weights (sigmoid or pre-softmax routers); 0 means 1.
    scaling_factor: float = 0.0


@dataclass(frozen=True)
class MLAConfig:
    """Multi-latent attention (DeepSeek-V2): keys and values from a small latent vector."""

    # Size of the latent that queries are projected from; 0 projects them from the hidden state.
    q_lora_rank: int = 0
    # Size of the latent that keys and values are projected from.
    kv_lora_rank: int = 512
    # Of a query or key head: the part without position, and the part that RoPE turns.
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    # Of a value head.
    v_head_dim: int = 128


@dataclass(frozen=True)
class RopeScalingConfig:
    """RoPE for sequences longer than those a model was first trained on."""

    # "yarn" (arXiv 2309.00071) as DeepSeek-V2 has it.
    type: Literal["none", "yarn"] = "none"
    # How many times longer, and than what.
    factor: float = 1.0
    original_max_position: int = 4096
    # Turns within the original length above which a frequency stays, below which it is divided by
    # the factor.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Weights of log(factor) in the scale of queries and keys, and in that of the scores; with both
    # 0 queries and keys are scaled by 0.1 * log(factor) + 1, and scores are not.
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3-MoE-shaped GPT: GQA or MLA, RMSNorm, RoPE, SwiGLU, optional shared expert."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    # Grouped-query attention, or multi-latent attention (DeepSeek-V2), whose sizes are in `mla`.
    attention: Literal["gqa", "mla"] = "gqa"
    # Key/value heads (GQA); equal to num_attention_heads for plain multi-head attention.
    num_query_groups: int = 2
    # 0 means hidden_size / num_attention_heads.
    head_dim: int = 0
    # Width of the dense SwiGLU layers (the leading ones, or all when num_experts is 0).
    dense_ffn_hidden_size: int = 512
    # 0 makes every layer dense.
    num_experts: int = 8
    experts_per_token: int = 2
    # f: neurons in one routed expert.
    expert_ffn_hidden_size: int = 128
    # Width of the expert every token visits; 0 for none.
    shared_expert_ffn_hidden_size: int = 0
    # A sigmoid gate on the shared expert (Qwen2-MoE).
    shared_expert_gate: bool = False
    # The first layers that are dense rather than MoE.
    first_dense_layers: int = 0
    # 0 takes the tokenizer's size.
    vocab_size: int = 0
    # The embedding is padded to a multiple of this, whatever the layout, so that checkpoints move;
    # the loss does not see the padding.
    vocab_padding_multiple: int = 128
    tie_embeddings: bool = False
    # Of the gate projection in every MLP (methods/activations): "silu" is SwiGLU.
    activation: Annotated[str, NameIn(ACTIVATIONS)] = "silu"
    # RMSNorm on queries and keys, before RoPE.
    qk_norm: bool = True
    # Over each head by itself (Qwen3), or over all query heads and all key heads together (OLMoE).
    qk_norm_scope: QKNormScope = "head"
    # A bias on the query, key and value projections (Qwen2).
    qkv_bias: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # Standard deviation of initial weights; residual outputs use init_std / sqrt(2 * num_layers).
    init_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    mla: MLAConfig = field(default_factory=MLAConfig)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a vocabulary of ``vocab_size``, whatever the layout."""
        multiple = self.vocab_padding_multiple
        return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class NeuronBalanceConfig:
    """The neuron balance loss (design.md section 1; `mone_megatron.mone.balance`)."""

    # 0 turns the loss off; its value is logged all the same.
    coeff: float = 0.0
    # Which loss (methods/losses).
    kind: Annotated[str, NameIn(LOSSES)] = "switch"
    # P_k: the mean weight of neuron k over the neurons a token keeps, or over all of them.
    weights: Literal["selected", "all"] = "selected"
    # Weights of a token divided by their sum (True), or raw |a| (False), which can be "balanced"
    # by shrinking them.
    normalize: bool = True


@dataclass(frozen=True)
class MoNEConfig:
    """Neuron selection inside the experts."""

    enabled: bool = False
    # The target density of every rule; "topk" keeps K = round(keep_ratio * f) neurons for each
    # token in each expert.
    keep_ratio: float = 0.25
    # What ranks the neurons of a token (methods/scores).
    score: Annotated[str, NameIn(SCORES)] = "abs_activation"
    # Which of them are kept (methods/rules), and the rule's own options by name.
    rule: Annotated[str, NameIn(RULES)] = "topk"
    rule_options: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    # Which MLPs select: routed experts, the shared expert, dense layers.
    apply_to: tuple[MoNETarget, ...] = ("routed",)
    # What the experts save for the backward pass: every neuron's values, or only those of the
    # kept ones (docs/performance.md).
    memory: Literal["full", "packed"] = "full"
    balance: NeuronBalanceConfig = field(default_factory=NeuronBalanceConfig)
    # The keep ratio over the first steps, so that an MoE with dense experts anneals into MoNE:
    # "constant" is keep_ratio from the first step, the others go down to it.
    keep_ratio_schedule: Literal["constant", "linear", "cosine"] = "constant"
    # The ratio of the first step (1 keeps all neurons), and after how many steps it is keep_ratio.
    keep_ratio_start: float = 1.0
    keep_ratio_steps: int = 0

    def keep_ratio_at(self, step: int) -> float:
        """The keep ratio that a step (from 1) trains with; a checkpoint of it is used with it."""
        if self.keep_ratio_schedule == "constant" or step > self.keep_ratio_steps:
            return self.keep_ratio
        progress = max(step - 1, 0) / self.keep_ratio_steps
        if self.keep_ratio_schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.keep_ratio_start + (self.keep_ratio - self.keep_ratio_start) * progress


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    # Where corpora come from (methods/sources): "stdlib" builds one from the Python standard
    # library in use; "indexed" reads
    # Megatron .bin/.idx files made by tools/preprocess_data.py.
    source: Annotated[str, NameIn(SOURCES)] = "stdlib"
    # Path prefixes of the .bin/.idx pairs, without the extension ("indexed" only).
    paths: tuple[str, ...] = ()
    # Sampling weight of each path; empty for weights by size.
    weights: tuple[float, ...] = ()
    # Shares of documents for training, validation and test.
    split: tuple[float, float, float] = (0.95, 0.05, 0.0)
    # Folder of a Hugging Face tokenizer (tokenizer.json); "" takes the one beside the data.
    tokenizer: str = ""
    # Vocabulary of the byte-level BPE that the stdlib corpus trains.
    vocab_size: int = 4096
    # The stdlib corpus takes files until this many MB of text; 0 for all.
    max_megabytes: float = 0.0
    # Corpora and dataset indices that can be made again live here.
    cache_dir: str = ".cache/mone_megatron"
    # Loader processes per rank; 0 loads in the training process.
    num_workers: int = 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, by default Adam with decoupled weight decay, and its learning rate."""

    # Which optimizer (methods/optimizers).
    name: Annotated[str, NameIn(OPTIMIZERS)] = "adam"
    lr: float = 3e-4
    min_lr: float = 3e-5
    # "wsd" is warmup-stable-decay.
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    # Share of all steps spent in the final decay of "wsd".
    decay_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    # Largest global gradient norm; 0 for no clipping.
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over processes; the data-parallel size is what is left."""

    tensor: int = 1
    pipeline: int = 1
    # Model chunks per pipeline rank; more than 1 interleaves the pipeline.
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    # Tensor parallelism inside the experts.
    expert_tensor: int = 1
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    # Shards optimizer state over the data-parallel ranks (ZeRO-1).
    distributed_optimizer: bool = True
    # Overlap of gradient reduction and parameter gathering with computation (CUDA).
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and evaluation."""

    steps: int = 100
    seed: int = 1234
    seq_length: int = 256
    # Sequences per step over all processes, and per forward pass of one model replica.
    global_batch_size: int = 8
    micro_batch_size: int = 2
    # Evaluate on the validation split every so many steps; 0 for never. The last step always
    # evaluates when this is not 0.
    eval_interval: int = 0
    # Global batches per evaluation.
    eval_steps: int = 4
    # Tasks of lm-evaluation-harness to run on the model meanwhile: names, YAML files or lists of
    # names (docs/evaluation.md).
    eval_tasks: tuple[str, ...] = ()
    # Run them every so many steps, and after the last; 0 for never.
    eval_tasks_interval: int = 0
    # Questions of each task; 0 for all.
    eval_tasks_limit: int = 0
    # More to measure or watch, in this order (methods/hooks).
    hooks: tuple[Annotated[str, NameIn(HOOKS)], ...] = ()
    # "selective" recomputes the activations of attention and the MoE layer; "full" whole layers.
    recompute: Literal["none", "selective", "full"] = "none"
    # Trace so many steps on rank 0, from the fifth of this process on: where their time goes
    # (docs/performance.md); 0 for none.
    profile: int = 0
    # Save and stop at the end of the step after so many minutes of the run, with the exit code that
    # asks to be started again; 0 for never.
    exit_after_minutes: float = 0.0
    # A step whose loss or gradient is not finite, or whose loss is a spike, is never applied; then
    # "abort" ends the run, "skip" goes on with the next batch, "rollback" goes back to the newest
    # checkpoint and leaves the batch out (docs/reliability.md).
    on_bad_loss: Literal["abort", "skip", "rollback"] = "abort"
    # A spike is a loss above so many times the median of the last 50 good ones; 0 for no check.
    spike_factor: float = 0.0
    # "skip" ends the run after so many skipped steps in a row.
    max_skips: int = 10
    # "rollback" ends the run after so many rollbacks.
    max_rollbacks: int = 3


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    # Save every so many steps; 0 for never.
    interval: int = 0
    # Write beside training: a save stops training only until its state is handed over.
    async_save: bool = False
    # "never" starts afresh, "auto" takes the newest checkpoint of this run, a path takes that one.
    resume: str = "never"
    # A checkpoint whose weights a new run begins with (docs/checkpoints.md); "" for none. With
    # "auto", checkpoints of the run itself come first.
    initialize: str = ""
    # Checkpoints kept: the newest so many, and every one whose step is a multiple of keep_every
    # (0 for none of those).
    keep_last: int = 2
    keep_every: int = 0


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. "disabled" does not even import the package."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "mone_megatron"
    # "" means the user's default.
    entity: str = ""
    # Runs of one comparison share a group.
    group: str = ""
    tags: tuple[str, ...] = ()
    # Longest wait for the server at the start (then offline) and at the end (then unfinished).
    timeout_seconds: float = 30.0


@dataclass(frozen=True)
class AlertsConfig:
    """Warnings about experts and neurons that stop working (docs/metrics.md#alerts)."""

    # Judge what is logged every logging.layer_interval steps.
    enabled: bool = True
    # An alert begins, and ends, when so many of these steps in a row say so.
    patience: int = 5
    # dead_expert: less than this part of a fair share of the tokens; 0 for no such alert.
    dead_expert: float = 0.05
    # dead_neurons: more than this share of an expert's neurons never kept; 1 for no such alert.
    dead_neurons: float = 0.5
    # load_collapse: the load of a router's experts, or of an expert's neurons, is spread by less
    # than this (0: always the same, 1: even); 0 for no such alert.
    load_collapse: float = 0.1
    # shrinking_weights: mean |a| fell by more than this part while the raw balance loss fell and
    # the load became no more even; 1 for no such alert.
    shrinking_weights: float = 0.5


@dataclass(frozen=True)
class LoggingConfig:
    """What a run shows."""

    # Print (lines) and send to W&B every so many steps; metrics.jsonl gets every step.
    interval: int = 1
    # Neuron and expert utilisation of each layer, every so many steps; 0 for never.
    layer_interval: int = 10
    # "auto" draws a bar on a terminal and prints lines elsewhere.
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    # loss.png and report.html at the end.
    report: bool = True
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class DeviceConfig:
    """The hardware."""

    # "auto" takes CUDA when there is a GPU.
    kind: Literal["auto", "cuda", "cpu"] = "auto"
    # "auto": bf16 on CUDA, fp32 on CPU.
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # "auto" takes the fastest kernels for the experts' neurons: Triton's on CUDA. "reference" is
    # plain torch, to compare with.
    kernels: Literal["auto", "reference"] = "auto"
    # Whose matrix products the experts use; "transformer_engine" needs it installed, and CUDA.
    grouped_gemm: Literal["torch", "transformer_engine"] = "torch"
    # Compute threads of one process on CPU; 0 shares the cores among the processes of the machine.
    threads: int = 0
    # Seconds without progress after which the run ends, naming the rank at fault.
    timeout_seconds: int = 600


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mone: MoNEConfig = field(default_factory=MoNEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
