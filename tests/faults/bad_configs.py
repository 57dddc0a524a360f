"""Configurations that cannot run: (processes, overrides, the key that must be named)."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from mone_megatron.config.convert import keys
from mone_megatron.config.schema import Config

BadConfig = tuple[int, tuple[str, ...], str]


def _kind(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def _wrong_value(kind: Any) -> str:
    """A value of another type than ``kind``."""
    if get_origin(kind) is Literal:
        return "nonesuch"
    if get_origin(kind) is tuple:
        return "7" if get_args(kind)[0] is str else "word"
    return {bool: "1", str: "7", int: "0.5", float: "word"}[kind]


def _wrong_types() -> list[BadConfig]:
    """One for every key there is."""
    return [(1, (f"{key}={_wrong_value(_kind(key))}",), key) for key in keys(Config)]


_UNKNOWN: list[BadConfig] = [
    (1, (override,), override.split("=")[0].lstrip("+~"))
    for override in (
        "train.step=5",
        "steps=5",
        "+model.num_expert=8",
        "model.layers=4",
        "model.router.balance_coef=0.1",
        "mone.ratio=0.5",
        "mone.balance.coef=0.1",
        "optim.learning_rate=0.1",
        "+optim.betas=[0.9,0.95]",
        "parallel.data=2",
        "parallel.sequence=true",
        "data.path=x",
        "+data.seed=3",
        "checkpoint.every=5",
        "logging.wandb.notes=a",
        "logging.mlflow=true",
        "device.backend=gloo",
        "run.folder=x",
        "+seed=3",
        "~train.nothing",
        "+trainer=fast",
        # Options of groups.
        "experiment=tiny_mon",
        "model=giant",
        "mone=some",
        "data=web",
        "optim=sgd",
        "parallel=fsdp",
        "train=long",
        "checkpoint=often",
        "logging=loud",
        "device=tpu",
        # What may never be in one.
        "+wandb.api_key=0123456789",
        "+logging.wandb.api_key=0123456789",
        "+data.hf_token=0123456789",
        "+run.password=0123456789",
        "+model._target_=os.system",
        "+run._target_=os.system",
        # Not an override; a sweep without -m.
        "optim.lr=1e-3,1e-4",
        "mone.keep_ratio=0.25,0.5",
        "train.seed=range(3)",
    )
]

_RANGES: list[BadConfig] = [
    (1, (override,), override.split("=")[0])
    for override in (
        "model.num_layers=0",
        "model.hidden_size=0",
        "model.num_attention_heads=0",
        "model.num_query_groups=-1",
        "model.head_dim=-2",
        "model.num_experts=-1",
        "model.experts_per_token=0",
        "model.expert_ffn_hidden_size=0",
        "model.shared_expert_ffn_hidden_size=-8",
        "model.first_dense_layers=-1",
        "model.vocab_size=-1",
        "model.vocab_padding_multiple=0",
        "model.norm_eps=0.0",
        "model.rope_theta=-1.0",
        "model.init_std=-0.1",
        "model.attention_dropout=1.0",
        "model.hidden_dropout=-0.1",
        "model.router.balance_coeff=[-0.01]",
        "model.router.z_loss_coeff=-1e-3",
        "model.router.num_groups=-1",
        "model.router.group_topk=-1",
        "model.router.scaling_factor=-1.0",
        "mone.keep_ratio=0.0",
        "mone.keep_ratio=1.01",
        "mone.keep_ratio=-0.25",
        "mone.balance.coeff=-0.01",
        "data.split=[0.5,-0.1,0.6]",
        "data.split=[0.0,0.0,0.0]",
        "data.split=[0.5,0.5]",
        "data.vocab_size=256",
        "data.max_megabytes=-1.0",
        "data.num_workers=-1",
        "data.cache_dir=' '",
        "optim.lr=0.0",
        "optim.lr=-1e-3",
        "optim.lr=.inf",
        "optim.lr=.nan",
        "optim.min_lr=-1e-5",
        "optim.warmup_steps=-1",
        "optim.decay_fraction=0.0",
        "optim.decay_fraction=1.5",
        "optim.weight_decay=-0.1",
        "optim.beta1=1.0",
        "optim.beta2=-0.1",
        "optim.eps=0.0",
        "optim.clip_grad=-1.0",
        "parallel.tensor=0",
        "parallel.pipeline=0",
        "parallel.virtual_pipeline=0",
        "parallel.context=0",
        "parallel.expert=0",
        "parallel.expert_tensor=-1",
        "train.steps=0",
        "train.steps=-5",
        "train.seed=-1",
        "train.seed=4294967296",
        "train.seq_length=0",
        "train.global_batch_size=0",
        "train.micro_batch_size=-2",
        "train.eval_interval=-1",
        "train.exit_after_minutes=-1.0",
        "train.spike_factor=0.5",
        "train.spike_factor=-2.0",
        "train.max_skips=-1",
        "train.max_rollbacks=-1",
        "checkpoint.interval=-1",
        "checkpoint.resume=''",
        "checkpoint.keep_last=0",
        "checkpoint.keep_every=-1",
        "logging.interval=0",
        "logging.layer_interval=-1",
        "logging.wandb.project=''",
        "logging.wandb.timeout_seconds=0.0",
        "device.threads=-1",
        "device.timeout_seconds=0",
        "run.name=''",
        "run.dir=''",
    )
]

_LAYOUTS: list[BadConfig] = [
    (8, ("parallel.tensor=8",), "parallel.tensor"),
    (4, ("parallel.tensor=4",), "parallel.tensor"),
    (3, ("parallel.tensor=3", "train.global_batch_size=6"), "parallel.tensor"),
    (3, ("parallel.tensor=2",), "parallel.tensor"),
    (3, ("parallel.pipeline=3",), "parallel.pipeline"),
    (2, ("parallel.pipeline=2", "model.num_layers=3"), "parallel.pipeline"),
    (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=4"), "parallel.pipeline"),
    (1, ("parallel.virtual_pipeline=2",), "parallel.virtual_pipeline"),
    (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=6"),
     "parallel.virtual_pipeline"),
    (2, ("parallel.context=2", "train.seq_length=98"), "train.seq_length"),
    (3, ("parallel.expert=3", "train.global_batch_size=6"), "parallel.expert"),
    (2, ("parallel.expert=4",), "parallel.expert"),
    (2, ("parallel.expert=2", "parallel.expert_tensor=2"), "parallel.expert"),
    (2, ("parallel.expert=2", "model.num_experts=0", "mone.enabled=false"), "parallel.expert"),
    (2, ("parallel.expert_tensor=2", "model.num_experts=0", "mone.enabled=false"),
     "parallel.expert_tensor"),
    (3, ("parallel.expert_tensor=3", "train.global_batch_size=6"), "parallel.expert_tensor"),
    (3, (), "train.global_batch_size"),
    (8, (), "train.global_batch_size"),
    (1, ("train.micro_batch_size=3",), "train.global_batch_size"),
    (2, ("parallel.tensor=2", "train.seq_length=63"), "train.seq_length"),
    (2, ("parallel.tensor=2", "model.vocab_padding_multiple=1"), "parallel.tensor"),
    (6, ("mone.balance.coeff=0.1", "parallel.tensor=2", "parallel.expert=3",
         "model.num_experts=9", "train.global_batch_size=6"), "mone.balance.coeff"),
]  # fmt: skip

_COMBINATIONS: list[BadConfig] = [
    (1, ("model.hidden_size=130",), "model.hidden_size"),
    (1, ("model.head_dim=33",), "model.head_dim"),
    (1, ("model.num_query_groups=3",), "model.num_query_groups"),
    (1, ("model.experts_per_token=9",), "model.experts_per_token"),
    (1, ("model.first_dense_layers=4",), "model.first_dense_layers"),
    (1, ("model.num_experts=0", "model.first_dense_layers=1"), "model.first_dense_layers"),
    (1, ("model.num_experts=0", "model.shared_expert_ffn_hidden_size=64"),
     "model.shared_expert_ffn_hidden_size"),
    (1, ("model.shared_expert_gate=true",), "model.shared_expert_gate"),
    (1, ("model.expert_ffn_hidden_size=66", "device.dtype=bf16"), "model.expert_ffn_hidden_size"),
    (1, ("model.router.balance_coeff=[0.1,0.1]",), "model.router.balance_coeff"),
    (1, ("model.router.balance=[]", "model.router.balance_coeff=[]"), "model.router.balance"),
    (1, ("model.router.balance=[none]",), "model.router.balance_coeff"),
    (1, ("model.router.balance=[sinkhorn,aux_loss]", "model.router.balance_coeff=[0.0,0.0]"),
     "model.router.balance"),
    (1, ("model.router.expert_bias=true",), "model.router.expert_bias"),
    (1, ("model.router.expert_bias=true", "model.router.score_function=sigmoid",
         "model.router.expert_bias_rate=0.0"), "model.router.expert_bias_rate"),
    (1, ("model.experts_per_token=1",), "model.router.pre_softmax"),
    (1, ("model.router.scaling_factor=2.0",), "model.router.scaling_factor"),
    (1, ("model.router.num_groups=2",), "model.router.group_topk"),
    (1, ("model.router.num_groups=3", "model.router.group_topk=1"), "model.router.num_groups"),
    (1, ("model.router.num_groups=2", "model.router.group_topk=4"), "model.router.group_topk"),
    (1, ("mone.keep_ratio=0.003",), "mone.keep_ratio"),
    (1, ("mone.apply_to=[]",), "mone.apply_to"),
    (1, ("mone.apply_to=[shared]",), "mone.apply_to"),
    (1, ("mone.apply_to=[dense]",), "mone.apply_to"),
    (1, ("mone.apply_to=[routed,routed]",), "mone.apply_to"),
    (1, ("model.num_experts=0",), "mone.apply_to"),
    (1, ("data.source=indexed",), "data.paths"),
    (1, ("data.source=indexed", "data.paths=['']"), "data.paths"),
    (1, ("data.source=indexed", "data.paths=[a,b]", "data.weights=[1.0]"), "data.weights"),
    (1, ("data.source=indexed", "data.paths=[a]", "data.weights=[0.0]"), "data.weights"),
    (1, ("data.paths=[a]",), "data.paths"),
    (1, ("data.weights=[1.0]",), "data.weights"),
    (1, ("data.split=[1.0,0.0,0.0]", "train.eval_interval=5"), "data.split"),
    (1, ("train.eval_interval=5", "train.eval_steps=0"), "train.eval_steps"),
    (1, ("model.vocab_size=300",), "model.vocab_size"),
    (1, ("optim.min_lr=1.0",), "optim.min_lr"),
    (1, ("optim.warmup_steps=20",), "optim.warmup_steps"),
    (1, ("optim.schedule=wsd", "optim.warmup_steps=15", "optim.decay_fraction=0.5"),
     "optim.decay_fraction"),
    (1, ("train.on_bad_loss=rollback",), "checkpoint.interval"),
    (1, ("parallel.dispatcher=flex",), "parallel.dispatcher"),
    (1, ("parallel.overlap_grad_reduce=true",), "parallel.overlap_grad_reduce"),
    (1, ("parallel.overlap_param_gather=true",), "parallel.overlap_param_gather"),
    (1, ("parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true",
         "parallel.distributed_optimizer=false"), "parallel.overlap_param_gather"),
]  # fmt: skip


def bad_configs() -> list[BadConfig]:
    """All of them, no two the same."""
    found = [*_wrong_types(), *_UNKNOWN, *_RANGES, *_LAYOUTS, *_COMBINATIONS]
    assert len({(size, overrides) for size, overrides, _ in found}) == len(found)
    return found
