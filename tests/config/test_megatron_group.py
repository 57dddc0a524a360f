"""The group ``megatron``: any field of the installed megatron-core, and none that is set here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.megatron import (
    BY_TRANSFORMER_ENGINE,
    NOT_READ,
    READ_WITH,
    SET_HERE,
    found_in,
    may_change_model,
    why_not_settable,
    with_given,
)
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.megatron_fields import CLASSES, MLA_CLASS, fields_of
from mone_megatron.megatron_release import megatron_folder, megatron_release
from mone_megatron.model.transformer import transformer_config
from mone_megatron.mone.megatron_settings import CORE_ATTENTION, NORM, ROUTED_EXPERTS
from mone_megatron.planning.unmodelled import unmodelled

LATER = megatron_release() >= (0, 19, 0)
# Refused by the modules that do not compute them.
COMPUTED = NORM.keys() | CORE_ATTENTION.keys() | ROUTED_EXPERTS.keys()
UPSTREAM: dict[str, Any] = {
    "transformer": TransformerConfig,
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
}


def problems_of(*overrides: str) -> tuple[str, ...]:
    return lines(compose(["experiment=tiny_mone", "device=cpu", *overrides]))


def lines(config: Config, world_size: int = 1, **options: Any) -> tuple[str, ...]:
    try:
        validate(config, world_size=world_size, **options)
    except ConfigError as error:
        return tuple(error.problems)
    return ()


@pytest.mark.parametrize("part", UPSTREAM)
def test_fields_are_read_from_source_as_python_has_them(part: str) -> None:
    assert set(fields_of(*CLASSES[part])) == {
        field.name for field in dataclasses.fields(UPSTREAM[part])
    }


def test_latent_attention_has_fields_of_its_own() -> None:
    theirs = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    assert set(fields_of(*MLA_CLASS)) == theirs
    assert "rope_type" in theirs - set(fields_of(*CLASSES["transformer"]))


@pytest.mark.parametrize("part", UPSTREAM)
def test_a_default_is_of_its_own_type(part: str) -> None:
    fields = fields_of(*CLASSES[part])
    checked = 0
    for field in dataclasses.fields(UPSTREAM[part]):
        if isinstance(field.default, (bool, int, float, str)) and fields[field.name].types:
            # Some defaults break their own annotation upstream (an int for a bool, say).
            checked += fields[field.name].takes(field.default)
    assert checked > 15


def test_fields_reach_megatron_core_and_the_identity_of_the_plan() -> None:
    config = compose(
        [
            "experiment=tiny_mone",
            "device=cpu",
            "megatron.transformer.distribute_saved_activations=false",
            "megatron.transformer.barrier_with_L1_time=false",
            "megatron.transformer.moe_input_jitter_eps=0.01",
            "megatron.ddp.bucket_size=1000",
        ]
    )
    validate(config, world_size=1)
    built = transformer_config(config, dtype=torch.float32, on_cpu=True, sequence_parallel=False)
    assert built.barrier_with_L1_time is False
    assert built.moe_input_jitter_eps == 0.01
    assert unmodelled(config) == [
        "megatron.transformer.distribute_saved_activations",
        "megatron.transformer.barrier_with_L1_time",
        "megatron.transformer.moe_input_jitter_eps",
        "megatron.ddp.bucket_size",
    ]
    assert config.megatron.changing() == ["megatron.transformer.moe_input_jitter_eps"]
    # What a model is built of in another layout.
    assert config.megatron.of_the_model().given() == {
        "transformer": {"moe_input_jitter_eps": 0.01},
        "optimizer": {},
        "ddp": {},
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("softmax_scale", True),
        ("rotary_interleaved", True),
        ("no_rope_freq", True),
        ("moe_expert_capacity_factor", True),
        ("num_layers_in_first_pipeline_stage", False),
        ("pipeline_model_parallel_layout", False),
        ("account_for_loss_in_pipeline_split", False),
        ("barrier_with_L1_time", False),
        ("moe_permute_fusion", False),
        # Of a release that is not known: it may.
        ("anything_new", True),
    ],
)
def test_what_may_change_a_model(name: str, changes: bool) -> None:
    assert may_change_model(name) is changes


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("megatron.transformer.hidden_size=64", "model.hidden_size sets it; use that key"),
        ("megatron.transformer.bf16=true", "device.dtype sets it; use that key"),
        ("megatron.transformer.add_bias_linear=true", "it cannot be set (this project decides it)"),
        ("megatron.transformer.calculate_per_token_loss=true", "it cannot be set"),
        ("megatron.transformer.mtp_num_layers=1", "model.mtp.depth sets it; use that key"),
        ("megatron.transformer.is_hybrid_model=true", "the models of this project have no such"),
        ("megatron.transformer.cuda_graph_impl=local", "use transformer_engine, or leave it out"),
        ("megatron.transformer.fp8_param=true", "checkpoints do not hold what it keeps"),
        ("megatron.transformer.moe_enable_deepep=true", "use parallel.dispatcher=flex and"),
        ("megatron.transformer.moe_flex_dispatcher_backend=deepep", "use parallel.dispatcher=flex"),
        ("megatron.optimizer.optimizer_cpu_offload=true", "checkpoints do not hold what it keeps"),
        ("megatron.ddp.use_megatron_fsdp=true", "checkpoints would keep the experts of one rank"),
        ("megatron.transformer.fp8=hybrid", "hybrid is not computed by the experts, norms or"),
        ("megatron.transformer.layernorm_zero_centered_gamma=true", "only False is"),
        ("megatron.transformer.qk_clip=true", "is not computed by the experts, norms or attention"),
        ("megatron.optimizer.lr=0.1", "optim.lr sets it; use that key"),
        ("megatron.ddp.overlap_grad_reduce=true", "parallel.overlap_grad_reduce sets it"),
        ("megatron.transformer.moe_permute_fusoin=true", "did you mean moe_permute_fusion"),
        ("megatron.optimizer.nonsense=1", "has no such field; see its source for the fields"),
        ("megatron.transformer.moe_permute_fusion=3", "3 is not bool"),
        ("megatron.transformer.moe_flex_dispatcher_backend=ring", "'ring' is not 'deepep' or"),
        ("megatron.ddp.bucket_size=large", "'large' is not int"),
        ("megatron.transformer.timers=1", "a configuration cannot say it: leave it out"),
        # Nothing here reads them.
        ("megatron.transformer.experimental_attention_variant=dsa", "have no such part"),
        ("megatron.transformer.linear_conv_kernel_dim=4", "have no such part"),
        ("megatron.transformer.linear_conf_kernel_dim=4", "TransformerConfig of megatron-core"),
        ("megatron.transformer.enable_cuda_graph=true", "makes CUDA graphs of attention only"),
        ("megatron.transformer.cuda_graph_scope=attn", "cuda_graph_impl sets it; use that key"),
        ("megatron.transformer.cuda_graph_warmup_steps=4", "read beside megatron.transformer.cuda"),
        ("megatron.transformer.delay_wgrad_compute=true", "training step of this project does not"),
        ("megatron.transformer.moe_router_topk_limited_devices=2", "model.router.group_topk sets"),
        ("megatron.transformer.moe_layer_recompute=true", "train.recompute sets it; use that key"),
        ("megatron.transformer.inference_rng_tracker=true", "it is for generating text"),
        ("megatron.optimizer.muon_momentum=0.9", "the optimizers of optim.name do not read it"),
        ("megatron.optimizer.hysteresis=4", "it is for fp16"),
        ("megatron.ddp.fsdp_double_buffer=true", "it is for Megatron-FSDP, which cannot be used"),
        ("megatron.ddp.num_distributed_optimizer_instances=2", "makes no process groups for it"),
        ("megatron.ddp.gradient_reduce_div_fusion=false", "it is for Megatron-FSDP"),
        ("megatron.transformer.enable_autocast=true", "device.dtype sets it; use that key"),
        ("megatron.transformer.tp_comm_overlap=true", "this project makes no buffers for it"),
        ("megatron.transformer.test_mode=true", "it is for megatron-core's own tests"),
        ("megatron.transformer.use_te_rng_tracker=true", "keeps the random states itself"),
        ("megatron.transformer.use_ring_exchange_p2p=true", "PyTorch has no ring_exchange"),
        ("megatron.transformer.memory_efficient_layer_norm=true", "is not computed by the experts"),
        ("megatron.transformer.fp32_residual_connection=true", "is not computed by the experts"),
        # Only with something else that is not there.
        ("megatron.transformer.fp8_margin=1", "it is read beside megatron.transformer.fp8 only"),
        ("megatron.transformer.first_last_layers_bf16=true", "fp8 or megatron.transformer.fp4"),
        ("megatron.transformer.qk_clip_alpha=0.4", "beside megatron.transformer.qk_clip only"),
        ("megatron.transformer.moe_token_drop_policy=position", "moe_expert_capacity_factor only"),
        ("megatron.optimizer.decoupled_min_lr=0.1", "beside megatron.optimizer.decoupled_lr only"),
        ("megatron.transformer.moe_deepep_num_sms=8", "no effect with parallel.dispatcher"),
        ("megatron.transformer.moe_router_fusion=true", "Transformer Engine (a CPU has none)"),
        ("megatron.transformer.moe_permute_fusion=true", "Transformer Engine (a CPU has none)"),
        ("megatron.transformer.cpu_offloading=true", "Transformer Engine (a CPU has none)"),
        ("megatron.transformer.cp_comm_type=p2p", "Transformer Engine (a CPU has none)"),
        ("megatron.ddp.nccl_ub=true", "it needs NCCL, which is for GPUs"),
    ],
)
def test_what_it_refuses(override: str, says: str) -> None:
    assert_refused(override, says)


@pytest.mark.skipif(not LATER, reason="fields of megatron-core 0.19")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("megatron.transformer.use_mup=true", "this project draws the initial weights itself"),
        ("megatron.transformer.mup_width_mult=2.0", "draws the initial weights itself"),
        ("megatron.transformer.gtp_weight_remat_size=2", "makes no process groups for it"),
        ("megatron.transformer.moe_mlp_glu_interleave_size=32", "is not computed by the experts"),
        ("megatron.transformer.moe_paged_stash=true", "is not computed by the experts"),
        ("megatron.transformer.flash_attention_version=3", "is not computed by the experts"),
        ("megatron.transformer.flash_attention_version=5", "5 is not 2 or 3 or 4"),
        ("megatron.transformer.mtp_detach_head=true", "did you mean mtp_detach_heads"),
        ("megatron.transformer.moe_flex_dispatcher_num_sms=many", "'many' is not int"),
        ("megatron.transformer.inference_cuda_graph_scope=layer", "it is for generating text"),
        ("megatron.optimizer.grad_norm_skip_threshold=10.0", "step of this project does not read"),
        ("megatron.optimizer.optimizer_cuda_graph=true", "makes CUDA graphs of attention only"),
        ("megatron.optimizer.lion_beta1=0.9", "the optimizers of optim.name do not read it"),
        ("megatron.ddp.megatron_fsdp_cuda_graph_mode=true", "it is for Megatron-FSDP"),
        ("megatron.ddp.num_buckets=4", "it is for Megatron-FSDP"),
        ("megatron.transformer.mlp_chunks_for_training=2", "is not computed by the experts"),
        ("megatron.transformer.moe_flex_dispatcher_num_sms=8", "use parallel.dispatcher=flex"),
        ("megatron.transformer.moe_ncclep_zero_copy=true", "it is for NCCL-EP"),
    ],
)
def test_what_it_refuses_of_later_releases(override: str, says: str) -> None:
    assert_refused(override, says)


@pytest.mark.parametrize(
    "override",
    [
        "megatron.transformer.moe_router_force_load_balancing=true",
        "megatron.transformer.moe_expert_capacity_factor=2",
        "megatron.transformer.rotary_interleaved=true",
        "megatron.optimizer.decoupled_lr=0.001",
        "megatron.ddp.average_in_collective=true",
        # As it is without them.
        "megatron.transformer.moe_permute_fusion=false",
        "megatron.transformer.moe_router_fusion=false",
    ] + [
        "megatron.transformer.moe_router_force_biased=0.5",
        "megatron.transformer.mlp_chunks_for_training=1",
    ] * LATER,
)  # fmt: skip
def test_what_it_takes(override: str) -> None:
    assert problems_of(override) == ()
    assert unmodelled(compose(["experiment=tiny_mone", override])) == [override.split("=")[0]]


def test_what_parts_of_the_model_read_is_refused_without_them() -> None:
    jitter = "megatron.transformer.moe_input_jitter_eps=0.01"
    assert problems_of(jitter) == ()
    dense = ("experiment=tiny_moe", "model.num_experts=0", jitter)
    (line,) = problems_of(*dense)
    assert line == (
        "megatron.transformer.moe_input_jitter_eps: it has no effect with model.num_experts=0; "
        "leave it out"
    )
    if LATER:
        detached = "megatron.transformer.mtp_detach_heads=true"
        assert_refused(detached, "it has no effect with model.mtp.depth=0")
        assert problems_of(detached, "model.mtp.depth=1") == ()


@pytest.mark.parametrize(("router", "refused"), [("topk", False), ("cosine", True), ("relu", True)])
def test_the_fused_router_is_megatron_cores(router: str, refused: bool) -> None:
    key = "megatron.transformer.moe_router_fusion"
    settings = [f"model.router.kind={router}", f"{key}=true", "device=cuda"]
    config = compose(["experiment=tiny_mone", *settings])
    found = lines(config, num_devices=1, have_transformer_engine=True)
    told = [line for line in found if line.startswith(f"{key}: it has no effect with model.router")]
    assert bool(told) is refused, found


def assert_refused(override: str, says: str) -> None:
    (line,) = problems_of(override)
    assert line.startswith(override.split("=")[0] + ":")
    assert says in line


def test_every_field_that_is_set_here_is_one_of_some_release() -> None:
    for part, fields in SET_HERE.items():
        there = set(fields_of(*(MLA_CLASS if part == "transformer" else CLASSES[part])))
        # `cuda_graph_scope` and the like come and go with releases.
        assert len(set(fields) - there) <= 3, sorted(set(fields) - there)


# What only one of the releases has, of what nothing here reads.
ONLY = {
    "0.16": {
        "moe_use_legacy_grouped_gemm", "moe_extended_tp", "preserve_fp32_weights",
        "async_tensor_model_parallel_allreduce",
    },
    "0.19": {
        "mtp_use_repeated_layer", "mtp_hybrid_override_pattern", "use_mup", "mup_", "lion_",
        "nccl_all_reduce_for_prefill", "moe_pad_experts_for_cuda_graph_inference", "soap_",
        "tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards",
        "gtp_weight_remat_size", "expert_gtp_weight_remat_size", "adaptive_muon_",
        "overlap_dispatch_backward_with_experts_wgrad", "high_priority_a2a_comm_stream",
        "use_grouped_gemm_for_shared_expert", "use_grouped_gemm_for_dense_mlp",
        "mla_down_proj_fusion", "moe_shared_expert_glu_interleave_size", "optimizer_cuda_graph",
        "use_layer_wise_distributed_optimizer", "grad_norm_skip_threshold", "fp4_param_gather",
        "megatron_fsdp_", "moe_ncclep_", "moe_router_quantile_balancing_ema", "num_buckets",
    },
}  # fmt: skip


def test_what_nothing_reads_is_a_field_of_the_release_that_is_named() -> None:
    other = ONLY["0.16" if LATER else "0.19"]
    for part, unread in NOT_READ.items():
        there = set(fields_of(*(MLA_CLASS if part == "transformer" else CLASSES[part])))
        for name in unread:
            found = name in there or any(field.startswith(name) for field in there)
            assert found is (name not in other), f"{part}.{name}"


# Files of megatron-core that no model and no step of this project runs.
_ELSEWHERE = (
    "config_logger.py", "distributed/fsdp/", "export/", "inference/", "models/T5/", "models/bert/",
    "models/hybrid/", "models/mimo/", "models/multimodal/", "models/vision/", "post_training/",
    "resharding/", "ssm/", "transformer/experimental_attention_variant/",
)  # fmt: skip
# Where fields are defined, and checked against one another.
_DEFINED = {file for file, _ in CLASSES.values()} | {"model_parallel_config.py"}
_TRANSFORMER_ENGINE = "extensions/transformer_engine.py"
# Read at their construction, for other fields; and one that writes the configuration to a file.
_BY_ITSELF = {
    "config_logger_dir",
    "moe_deepep_num_sms",
    "moe_enable_deepep",
    "moe_hybridep_num_sms",
}


@pytest.mark.parametrize("part", UPSTREAM)
def test_every_field_that_may_be_set_is_read_where_it_has_an_effect(part: str) -> None:
    """One that no code of ours gets to would be taken without a word, of a new release, too."""
    core = megatron_folder()
    texts = {
        name: path.read_text(encoding="utf-8")
        for path in core.rglob("*.py")
        if not (name := path.relative_to(core).as_posix()).startswith(_ELSEWHERE)
        and name not in _DEFINED
    }
    checked = 0
    for name, field in fields_of(*(MLA_CLASS if part == "transformer" else CLASSES[part])).items():
        sayable = field.types or field.choices
        if not sayable or why_not_settable(part, name) or name in _BY_ITSELF | COMPUTED:
            continue
        read = re.compile(rf"(\.|['\"]){name}\b")
        readers = {file for file, text in texts.items() if read.search(text)}
        alone = readers == {_TRANSFORMER_ENGINE}
        beside = found_in(name, READ_WITH[part]) or name in BY_TRANSFORMER_ENGINE
        assert readers, f"{part}.{name} is read nowhere"
        assert beside or not alone, f"{part}.{name} is read by Transformer Engine's modules only"
        checked += 1
    assert checked > {"transformer": 40, "optimizer": 2, "ddp": 5}[part]


@pytest.mark.parametrize("table", [NOT_READ, READ_WITH])
def test_tables_name_no_field_of_another(table: Mapping[str, Mapping[str, object]]) -> None:
    other = NOT_READ if table is READ_WITH else READ_WITH
    for part, names in table.items():
        assert not {name for name in names if name in other[part] or name in SET_HERE[part]}


def _settable_default(field: dataclasses.Field[Any]) -> bool:
    return isinstance(field.default, bool | int | float | str)


@pytest.mark.parametrize("part", UPSTREAM)
def test_what_nothing_reads_is_refused_even_at_its_default(part: str) -> None:
    fields = [field for field in dataclasses.fields(UPSTREAM[part]) if _settable_default(field)]
    refused = {field.name: field.default for field in fields if why_not_settable(part, field.name)}
    given = [f"megatron.{part}.{name}={value}" for name, value in refused.items()]
    told = {line.split(":")[0] for line in problems_of(*given)}
    assert told == {f"megatron.{part}.{name}" for name in refused}
    assert len(refused) > 15
    # None of them reaches megatron-core, whatever another check is asked.
    with pytest.raises(AssertionError, match="the configuration was not checked"):
        with_given(part, {}, {next(iter(refused)): 1})


def test_fields_are_known_without_importing_torch_or_megatron() -> None:
    code = (
        "import sys\n"
        "from mone_megatron.megatron_fields import CLASSES, fields_of\n"
        "assert all(len(fields_of(*place)) > 20 for place in CLASSES.values())\n"
        "sys.exit(9 if {'torch', 'megatron'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["megatron.transformer.fp8_recipe=mxfp8"], None),
        (["megatron.transformer.fp8_recipe=delayed"], "delayed keeps scales that checkpoints"),
        ([], "delayed keeps scales that checkpoints do not hold"),
        (["mone.enabled=true", "mone.apply_to=[dense]"], "is not computed by the experts"),
    ],
)
def test_fp8_is_for_dense_models_whose_layers_are_all_transformer_engines(
    overrides: list[str], says: str | None
) -> None:
    dense = ["experiment=tiny_moe", "device=cuda", "model.num_experts=0"]
    config = compose([*dense, "megatron.transformer.fp8=hybrid", *overrides])
    found = lines(config, num_devices=1, have_transformer_engine=True)
    if says is None:
        assert found == ()
    else:
        assert any(says in line for line in found), found
    # Without it, nothing computes fp8.
    found = lines(config, num_devices=1, have_transformer_engine=False)
    assert any(line.startswith("megatron.transformer.fp8: hybrid is not") for line in found)


@pytest.mark.parametrize(
    ("source", "backend", "says"),
    [
        ("class HybridEPBuffer: ...", "hybridep", None),
        ("class Buffer: ...", "hybridep", "hybridep needs a DeepEP with HybridEPBuffer"),
        ("class Buffer: ...", "deepep", None),
    ],
)
def test_hybrid_ep_needs_a_deep_ep_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, backend: str, says: str | None
) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = compose(
        [
            "experiment=tiny_mone", "device=cuda", "parallel.dispatcher=flex",
            "parallel.expert=2", "mone.balance.scope=group",
            f"megatron.transformer.moe_flex_dispatcher_backend={backend}",
        ]
    )  # fmt: skip
    found = lines(config, 2, num_devices=2)
    if says is None:
        assert found == ()
    else:
        (line,) = found
        assert says in line


@pytest.mark.parametrize(
    ("override", "told"),
    [
        # A list is no single value, and may not be there whatever it is.
        ("transformer.cuda_graph_scope=[moe]", "megatron.transformer.cuda_graph_impl sets it; use"),
        ("transformer.num_layers=[3]", "model.num_layers sets it; use that key"),
        ("optimizer.lr={a: 1}", "optim.lr sets it; use that key"),
        ("transformer.softmax_scale=[3]", "[3] is no single value; give a text, a number, true or"),
    ],
)
def test_what_may_not_be_set_is_told_before_its_type(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([f"megatron.{override}"])
    assert refused.value.problems[0].startswith(f"megatron.{override.split('=')[0]}: {told}")
