"""Imports a Hugging Face model as a checkpoint of ours that any layout loads.

The checkpoint holds weights only, at step 0: ``checkpoint.initialize=PATH`` starts a run with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from mone_megatron.checkpoint import CheckpointStore
from mone_megatron.checkpoint.facts import ORIGIN
from mone_megatron.checkpoint.tensors import TensorWriter
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import to_yaml
from mone_megatron.config.schema import (
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    MoNEConfig,
    RouterConfig,
    RunConfig,
)
from mone_megatron.config.validate import validate
from mone_megatron.data.framing import Framing
from mone_megatron.data.tokenizer import copy_tokenizer, end_of_document, load_tokenizer
from mone_megatron.hf.architectures import COPIES, FUSED, ExpertNames
from mone_megatron.hf.dtypes import (
    describe_dtypes,
    dtype_name,
    widest,
    written_dtype,
)
from mone_megatron.hf.export import check_values, new_folder
from mone_megatron.hf.mapping import Rule, rules
from mone_megatron.hf.origin import Origin
from mone_megatron.hf.settings import ImportedSettings, from_hf_config
from mone_megatron.hf.text_format import framing_of_folder
from mone_megatron.hf.weights import HFWeights

# Recomputed from the configuration by every program; old checkpoints hold it all the same.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Upcycling:
    """Describes how a dense model becomes one with experts, each a copy of the dense MLP."""

    experts: int
    experts_per_token: int


@dataclass(frozen=True)
class Import:
    """Describes what is to be imported, checked against the headers of its files."""

    folder: Path
    settings: ImportedSettings
    model: ModelConfig
    table: tuple[Rule, ...]
    upcycling: Upcycling | None
    framing: Framing
    origin: Origin

    def dtypes(self, weights: HFWeights, wanted: torch.dtype | None) -> dict[str, torch.dtype]:
        """Returns the dtype of each of our tensors: ``wanted``, or one that holds its parts."""
        parts: dict[str, set[torch.dtype]] = {}
        for rule in self.table:
            parts.setdefault(rule.ours, set()).update(
                weights.dtype(name) for name, _ in rule.theirs
            )
        return {ours: written_dtype(ours, widest(stored), wanted) for ours, stored in parts.items()}

    def describe_dtypes(self, weights: HFWeights) -> str:
        """Tells in one line in which dtypes the model is stored."""
        main = weights.main_dtype
        line = describe_dtypes({name: weights.dtype(name) for name in weights.names}, main)
        if self.settings.dtype not in (None, dtype_name(main)):
            line += f" (config.json says {self.settings.dtype}, which is not what is stored)"
        return line


def load_hf_config(folder: Path) -> PreTrainedConfig:
    """Reads a local model's configuration, without running code of its own.

    Raises:
        ValueError: none there, or one that only its own code understands.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json; give the folder of a downloaded model")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(
                f"{folder}: its configuration needs code of its own, which is not run here; only "
                "architectures that transformers knows are imported"
            ) from None
        raise ValueError(f"{folder}/config.json: cannot be used ({reason[:300]})") from None
    assert isinstance(config, PreTrainedConfig)
    return config


def plan_import(folder: Path, weights: HFWeights, *, upcycling: Upcycling | None = None) -> Import:
    """Decides which tensor goes where, and checks that all are there and nothing else is.

    Raises:
        ValueError: a configuration that is not supported; a tensor missing, extra or of another
            shape; a vocabulary that does not fit; each by name, before anything is written.
    """
    settings = from_hf_config(load_hf_config(folder), str(folder))
    weights.check_dtypes()
    model, experts = settings.model, _expert_names(settings, weights)
    if upcycling is not None:
        model, experts = _upcycled(settings.model, upcycling), COPIES
    _check_keys(folder, model, settings.mone)
    table = tuple(rules(model, settings.vocab_size, settings.architecture, experts, settings.mone))
    _check_tensors(folder, weights, table, model)
    _check_tokenizer(folder, settings.vocab_size)
    framing, origin = _framing(folder), Origin.read(folder)
    return Import(folder, settings, model, table, upcycling, framing, origin)


def _check_keys(folder: Path, model: ModelConfig, mone: MoNEConfig | None) -> None:
    """Checks, as a run does, the keys that the import prints for one.

    Raises:
        ValueError: a line for each key that no run could have.
    """
    config = Config(
        model=model,
        mone=mone or MoNEConfig(),
        # Any: they are the run's own.
        data=DataConfig(source="indexed", paths=("data",)),
        device=DeviceConfig(kind="cpu", dtype="fp32"),
    )
    try:
        validate(config, world_size=1)
    except ConfigError as error:
        lines = [f"{folder}: cannot be trained here: {line}" for line in error.problems]
        raise ValueError("\n".join(lines)) from None


def _expert_names(settings: ImportedSettings, weights: HFWeights) -> ExpertNames:
    """Returns how this model's experts are stored: transformers itself writes either way."""
    if any(name.endswith(".experts.gate_up_proj") for name in weights.names):
        return FUSED
    names = settings.architecture.experts
    if not any(f".{names.block}.experts." in name for name in weights.names):
        return ExpertNames("split")
    return names


def _upcycled(model: ModelConfig, upcycling: Upcycling) -> ModelConfig:
    if model.num_experts:
        raise ValueError("--upcycle-experts: the model has experts already")
    if not 1 <= upcycling.experts_per_token <= upcycling.experts:
        raise ValueError(
            f"--upcycle-experts-per-token: {upcycling.experts_per_token} is not between 1 and "
            f"--upcycle-experts={upcycling.experts}"
        )
    if upcycling.experts_per_token == 1:
        raise ValueError(
            "--upcycle-experts-per-token: 1 expert has the weight 1 whatever the router says, so "
            "the router would get no gradient; use 2 or more"
        )
    return replace(
        model,
        num_experts=upcycling.experts,
        experts_per_token=upcycling.experts_per_token,
        expert_ffn_hidden_size=model.dense_ffn_hidden_size,
        first_dense_layers=0,
        # The weights of a token's experts sum to 1, so at first nothing changes.
        router=RouterConfig(pre_softmax=False),
    )


def _check_tensors(
    folder: Path, weights: HFWeights, table: Iterable[Rule], model: ModelConfig
) -> None:
    wanted = {name: shape for rule in table for name, shape in rule.theirs}
    extra = {name for name in weights.names - wanted.keys() if not _DERIVED.search(name)}
    if model.tie_embeddings and _HEAD in extra:
        extra.discard(_HEAD)
        if not torch.equal(weights.read(_HEAD), weights.read(_EMBEDDING)):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {_HEAD} is not {_EMBEDDING}"
            )
    problems = [f"{name} is missing" for name in wanted.keys() - weights.names]
    problems += [f"{name} has no place in our model" for name in extra]
    problems += [
        f"{name} is {weights.shape(name)}, not {shape}"
        for name, shape in wanted.items()
        if name in weights.names and weights.shape(name) != shape
    ]
    if problems:
        shown = sorted(problems)[:10]
        more = [f"{folder}: and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError("\n".join([f"{folder}: {problem}" for problem in shown] + more))


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    size = load_tokenizer(folder).vocab_size
    if size > vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {size} entries, more than vocab_size={vocab_size}"
        )


def _framing(folder: Path) -> Framing:
    """Returns the special tokens around documents, as of whatever reads the model's texts."""
    tokenizer = load_tokenizer(folder)
    try:
        eod: int | None = end_of_document(tokenizer)
    except ValueError:
        eod = None
    return framing_of_folder(folder, tokenizer.tokenizer, eod)


def run_import(
    planned: Import,
    weights: HFWeights,
    output: Path,
    *,
    dtype: torch.dtype | None,
    seed: int,
    name: str,
    check: Callable[[Path], None],
    progress: Callable[[str], None],
) -> Path:
    """Writes the checkpoint ``output/checkpoints/step_00000000``, tensor by tensor.

    Args:
        planned: from :func:`plan_import`.
        weights: open.
        output: a folder that is not there yet, or empty.
        dtype: of the weights; None keeps that of each tensor.
        seed: for the routers of an upcycled model.
        name: of the model, for people.
        check: is called with the checkpoint before ``output`` is there; raises to refuse it.
        progress: is told of each layer.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a weight that is all zero or not finite; nothing is left then.
    """
    dtypes = planned.dtypes(weights, dtype)
    main = dtype or weights.main_dtype
    with new_folder(output) as hidden:
        store = CheckpointStore(hidden / "checkpoints", log=progress)
        partial = store.begin(0)
        writer = TensorWriter(partial)
        try:
            for rule in planned.table:
                _take(rule, weights, writer, dtypes[rule.ours])
                if rule.ours.endswith("pre_mlp_layernorm.weight"):
                    layer = int(rule.ours.split(".")[2]) + 1
                    progress(f"layer {layer} of {planned.model.num_layers}")
            for router, tensor in _new_routers(planned, seed):
                writer.add(router, tensor.to(main))
            writer.finish({"step": 0})
        finally:
            writer.close()
        config = _config(planned, name)
        (partial / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        copy_tokenizer(planned.folder, partial / "tokenizer")
        checkpoint = store.commit(partial, _facts(planned, config, main))
        check(checkpoint)
    return output / checkpoint.relative_to(hidden)


def _take(rule: Rule, weights: HFWeights, writer: TensorWriter, dtype: torch.dtype) -> None:
    theirs = tuple(weights.read(name) for name, _ in rule.theirs)
    theirs = tuple(tensor.to(dtype) for tensor in theirs)
    for (name, _), tensor in zip(rule.theirs, theirs, strict=True):
        check_values(name, tensor)
    ours = rule.take(theirs)
    if rule.row is None:
        writer.add(rule.ours, ours)
    else:
        writer.add_row(rule.ours, rule.shape[0], rule.row, ours)


def _new_routers(planned: Import, seed: int) -> Iterable[tuple[str, Tensor]]:
    """Yields name and weight of an upcycled model's routers, drawn as a new model's."""
    if planned.upcycling is None:
        return
    model = planned.model
    for layer in range(model.num_layers):
        generator = torch.Generator().manual_seed(seed * model.num_layers + layer)
        shape = (model.num_experts, model.hidden_size)
        drawn = torch.empty(shape).normal_(0.0, model.init_std, generator=generator)
        yield f"decoder.layers.{layer}.mlp.router.weight", drawn


def _config(planned: Import, name: str) -> Config:
    mone = planned.settings.mone or MoNEConfig()
    base = Config()
    return replace(
        base,
        run=RunConfig(name=name),
        model=planned.model,
        mone=mone,
        train=replace(base.train, seq_length=planned.settings.max_positions),
    )


def _facts(planned: Import, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    identity = _flat("model", asdict(config.model))
    identity |= {"vocab_size": planned.settings.vocab_size, "dtype": str(dtype)}
    return {
        "tokens": 0,
        "identity": identity,
        "layout": {},
        "framing": planned.framing.as_facts(),
        "imported_from": planned.settings.architecture.class_name,
        ORIGIN: planned.origin.to_facts(),
    }


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted names.

    They are those of :func:`mone_megatron.train.resume.identity.run_identity`.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}.{key}"
        if isinstance(value, dict):
            flat |= _flat(dotted, value)
        else:
            flat[dotted] = list(value) if isinstance(value, tuple) else value
    return flat


def model_overrides(model: ModelConfig, mone: MoNEConfig | None = None) -> list[str]:
    """Returns the Hydra overrides that make ``model.*`` that of an imported checkpoint.

    They set ``mone.*``, too, where the imported model selects neurons itself.
    """
    settings, defaults = (
        _flat("model", asdict(of_model)) | _flat("mone", asdict(of_mone))
        for of_model, of_mone in (
            (model, mone or MoNEConfig()),
            (ModelConfig(), MoNEConfig()),
        )
    )
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    return [f"{key}={_spell(value)}" for key, value in changed.items()]


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_spell(item) for item in value)}]"
    return str(value)
