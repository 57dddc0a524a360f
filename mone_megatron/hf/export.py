"""Exports a checkpoint of ours to a Hugging Face folder, one shard in memory at a time.

The folder is written under a hidden name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from mone_megatron.config.schema import ModelConfig, MoNEConfig
from mone_megatron.hf.architectures import BY_TYPE, MONE, Architecture
from mone_megatron.hf.card import model_card
from mone_megatron.hf.dtypes import dtype_name, written_dtype
from mone_megatron.hf.mapping import Rule, rules
from mone_megatron.hf.settings import to_hf_config
from mone_megatron.hf.source import Source
from mone_megatron.hf.text_format import RECIPE_KEY, RECIPE_NAME, write_tokenizer
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.registry import Registry
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES

INDEX_NAME = "model.safetensors.index.json"
# What a model with code of ours needs beside it: file in the export -> module it is made from.
_CODE = {
    "configuration_mone.py": "mone_megatron/hf/configuration_mone.py",
    "experts_mone.py": "mone_megatron/hf/experts_mone.py",
    "guard_mone.py": "mone_megatron/hf/guard_mone.py",
    "modeling_mone.py": "mone_megatron/hf/modeling_mone.py",
    "parallel_mone.py": "mone_megatron/hf/parallel_mone.py",
    "neuron_selection.py": "mone_megatron/kernels/reference.py",
    "product_keys.py": "mone_megatron/kernels/product_keys.py",
    "bound.py": "mone_megatron/methods/bound.py",
    "gate.py": "mone_megatron/methods/gate.py",
    "grouped_rows.py": "mone_megatron/methods/grouped_rows.py",
    "options.py": "mone_megatron/methods/options.py",
    "router.py": "mone_megatron/methods/router.py",
    "rule.py": "mone_megatron/methods/rule.py",
    "score.py": "mone_megatron/methods/score.py",
}
# Which of their classes transformers loads. No ``AutoModel``: it is what inference engines build a
# model from whose experts they replace by their own, which compute all neurons.
AUTO_MAP = {
    "AutoConfig": "configuration_mone.MoneConfig",
    "AutoModelForCausalLM": "modeling_mone.MoneForCausalLM",
}
# The registries of an export hold one method each, whose file is beside them: file in the export
# -> (package that it stands for, its name there, file of the method).
_REGISTRIES = {
    "neuron_scores.py": ("mone_megatron.methods.scores", "SCORES", "neuron_score"),
    "neuron_rules.py": ("mone_megatron.methods.rules", "RULES", "neuron_rule"),
    "expert_gates.py": ("mone_megatron.methods.gates", "GATES", "expert_gate"),
    "expert_routers.py": ("mone_megatron.methods.routers", "ROUTERS", "expert_router"),
}
_REGISTRY = '''"""The one method of its kind that this model was trained with."""

from .{file} import METHOD


class _Only(dict):
    """A registry of one method."""

    def __missing__(self, name):
        raise ValueError(f"{key}: {{name!r}} is unknown to this model; it knows {{METHOD.name}}")

    def __iter__(self):
        return iter(self.values())


{name} = _Only({{METHOD.name: METHOD}})
'''
_PACKAGE = Path(__file__).resolve().parents[2]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """Describes what an export wrote."""

    folder: Path
    architecture: Architecture
    tensors: int
    bytes: int


def refuse_unknown(source: Source) -> None:
    """Refuses models that transformers, with our class for it, does not compute.

    Raises:
        ValueError: naming the key that makes it such a model.
    """
    mone, router = source.mone.enabled, ROUTERS[source.model.router.kind]
    if not router.causal and source.model.num_experts:
        raise ValueError(
            f"model.router.kind: {router.name} looks at other tokens outside training, too, and so "
            "cannot generate; such models cannot be exported"
        )
    if not router.stock and router.reference is not None and source.model.num_experts:
        raise ValueError(
            f"model.router.kind: {router.name} is a class of megatron-core's, which transformers "
            "cannot run; such models cannot be exported (functions of a router can)"
        )
    if mone and not RULES[source.mone.rule].causal:
        raise ValueError(
            f"mone.rule: {source.mone.rule} looks at other tokens outside training, too, and so "
            "cannot generate; such models cannot be exported"
        )
    if mone and RULES[source.mone.rule].shifts(source.mone.rule_options):
        raise ValueError(
            f"mone.rule_options.{RULES[source.mone.rule].shift_option}: true changes gate "
            "projections, which no model of transformers with experts does; such models cannot be "
            "exported"
        )
    for key, off in (("attention_window", 0), ("attention_sink", "none")):
        if (value := getattr(source.model, key)) != off:
            raise ValueError(
                f"model.{key}: {value} is not known to the models of transformers that we write; "
                "such models cannot be exported"
            )
    if changing := source.config.megatron.changing():
        raise ValueError(
            f"{changing[0]}: it may change what the model computes, which an export would not say; "
            "such models cannot be exported"
        )


def choose_architecture(source: Source, wanted: str) -> Architecture:
    """Returns the architecture to export as.

    Args:
        source: the checkpoint.
        wanted: ``auto``, or a model type.

    Raises:
        ValueError: a model type that is unknown or cannot hold the model, saying what it lacks;
            or see :func:`refuse_unknown`.
    """
    refuse_unknown(source)
    mone = source.mone.enabled
    if wanted == "auto":
        return source.architecture
    if wanted not in BY_TYPE:
        raise ValueError(f"--architecture: {wanted!r} is not auto or one of {', '.join(BY_TYPE)}")
    architecture = BY_TYPE[wanted]
    if lacks := architecture.lacks(source.model, mone=mone):
        raise ValueError(
            f"--architecture: {wanted} cannot hold this model ({', '.join(lacks)}); use "
            f"{source.architecture.model_type}, or auto"
        )
    return architecture


def export_dtype(wanted: str) -> torch.dtype | None:
    """Returns the dtype to write weights in; None, for ``saved``, keeps that of each tensor.

    Raises:
        ValueError: an unknown name.
    """
    if wanted == "saved":
        return None
    if wanted not in _DTYPES:
        raise ValueError(f"--dtype: {wanted!r} is not saved or one of {', '.join(_DTYPES)}")
    return _DTYPES[wanted]


def hf_config(
    source: Source, architecture: Architecture, dtype: torch.dtype | None
) -> PreTrainedConfig:
    """Returns the exported model's configuration; ``dtype`` None puts in that of most weights.

    Raises:
        ValueError: see :func:`refuse_unknown`.
    """
    refuse_unknown(source)
    return to_hf_config(
        source.model,
        source.mone,
        architecture=architecture,
        vocab_size=source.vocab_size,
        max_positions=source.config.train.seq_length,
        dtype=dtype_name(dtype or source.dtype),
        token_ids=source.token_ids,
        origin=source.origin,
    )


def check_complete(source: Source, table: list[Rule]) -> None:
    """Checks that our tensors are those of the table, each in its shape.

    Raises:
        ValueError: naming each that is not.
    """
    there = {name: info.shape for name, info in source.weights.items()}
    wanted = {rule.ours: rule.shape for rule in table}
    problems = [f"{name} is missing" for name in wanted.keys() - there.keys()]
    problems += [f"{name} has no place there" for name in there.keys() - wanted.keys()]
    problems += [
        f"{name} is {there[name]}, not {wanted[name]}"
        for name in wanted.keys() & there.keys()
        if there[name] != wanted[name]
    ]
    if problems:
        lines = sorted(f"checkpoint {source.checkpoint.path}: {problem}" for problem in problems)
        raise ValueError("\n".join(lines))


def hf_tensors(
    source: Source, table: list[Rule], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and values of each tensor of the export, one rule at a time.

    Args:
        source: the checkpoint.
        table: from :func:`~mone_megatron.hf.mapping.rules`.
        dtype: what to convert to; None keeps that of each tensor.

    Raises:
        ValueError: a weight is all zero or not finite (in its new dtype, too); a tensor of theirs
            comes twice.
    """
    seen: set[str] = set()
    for rule in table:
        ours = source.read(rule.ours, rule.row, dtype=dtype)
        for name, tensor in rule.export(ours):
            if name in seen:
                raise ValueError(f"{name} is made twice")
            seen.add(name)
            check_values(name, tensor)
            yield name, tensor


def check_values(name: str, tensor: Tensor) -> None:
    """Refuses weights that no training leaves.

    Raises:
        ValueError: some value is not finite; a matrix, or one expert's, is all zero.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite in {dtype_name(tensor.dtype)}")
    if tensor.ndim == 1 or name.endswith("bias"):
        return
    parts = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
    for number, part in enumerate(parts):
        if not part.any():
            which = f"{name}, expert {number}," if tensor.ndim == 3 else name
            raise ValueError(f"{which} is all zero in {dtype_name(tensor.dtype)}")


def plan_shards(
    source: Source, table: list[Rule], dtype: torch.dtype | None, shard_bytes: int
) -> list[list[Rule]]:
    """Returns the rules in order, split into shards of at most ``shard_bytes`` of tensors.

    A rule whose tensors are larger together has a shard of its own.
    """
    stored = source.weights
    shards: list[list[Rule]] = []
    room = 0
    for rule in table:
        written = written_dtype(rule.ours, stored[rule.ours].dtype, dtype)
        size = sum(torch.Size(shape).numel() for _, shape in rule.theirs) * written.itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(rule)
        room -= size
    return shards


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a hidden folder that becomes ``output`` when the block ends well, or is removed.

    Raises:
        ValueError: ``output`` is there already, or cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is there already; remove it or write elsewhere")
    partial = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{output}: cannot be made ({error.strerror})") from None
    try:
        yield partial
        if output.exists():
            output.rmdir()
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export(
    source: Source,
    output: Path,
    *,
    architecture: Architecture,
    dtype: torch.dtype | None,
    shard_bytes: int,
    check: Callable[[Path], str],
    progress: Callable[[str], None],
) -> Exported:
    """Writes the Hugging Face folder.

    Args:
        source: the checkpoint.
        output: a folder that is not there yet, or empty.
        architecture: from :func:`choose_architecture`.
        dtype: of the weights; None keeps that of each tensor.
        shard_bytes: largest safetensors file, and about the largest memory used.
        check: is called with the folder before it gets its name; raises to refuse it, and returns
            the line for the model card.
        progress: is told of each shard.

    Raises:
        ValueError: see :func:`check_complete` and :func:`hf_tensors`; nothing is left then.
    """
    table = list(rules(source.model, source.vocab_size, architecture, mone=source.mone))
    check_complete(source, table)
    with new_folder(output) as partial:
        config = hf_config(source, architecture, dtype)
        if architecture is MONE:
            config.auto_map = dict(AUTO_MAP)
            write_code(partial, source.mone, source.model)
        config.save_pretrained(partial)
        _restore_config(source, architecture, partial / "config.json")
        _write_generation_config(source, partial)
        write_tokenizer(source.tokenizer_dir, partial, source.framing)
        _write_recipe(source, partial / RECIPE_NAME)
        tensors, size = _write_weights(source, table, partial, dtype, shard_bytes, progress)
        verified = check(partial)
        card = model_card(source, architecture, dtype or source.dtype, verified)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported(output, architecture, tensors, size)


def _restore_config(source: Source, architecture: Architecture, path: Path) -> None:
    """Puts back values that transformers reads as others, where the architecture is the same."""
    origin = source.origin
    if origin is None or origin.model_type != architecture.model_type:
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(_json(origin.as_it_was_written(saved)), encoding="utf-8")


def _write_generation_config(source: Source, folder: Path) -> None:
    """Writes the imported model's generation settings, with this tokenizer's special tokens."""
    path = folder / "generation_config.json"
    settings = {} if source.origin is None else dict(source.origin.generation)
    if not settings:
        GenerationConfig(**source.token_ids).save_pretrained(folder)
        return
    assert source.origin is not None
    config = source.origin.standard_config()
    settings |= {
        name: token for name, token in source.token_ids.items() if getattr(config, name) != token
    }
    # Written by ourselves: the library refuses to save some that it reads.
    path.write_text(_json(settings), encoding="utf-8")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _write_recipe(source: Source, path: Path) -> None:
    """Writes the run's configuration, without what names places on its machine, and the framing."""
    whole = yaml.safe_load((source.checkpoint.path / "config.yaml").read_text(encoding="utf-8"))
    kept = {name: whole[name] for name in ("model", "mone", "optim", "parallel", "train")}
    kept[RECIPE_KEY] = source.framing.as_facts()
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def _write_weights(
    source: Source,
    table: list[Rule],
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Callable[[str], None],
) -> tuple[int, int]:
    shards = plan_shards(source, table, dtype, shard_bytes)
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            name = "model.safetensors"
        tensors = dict(hf_tensors(source, shard, dtype))
        if twice := tensors.keys() & places.keys():
            raise ValueError(f"{sorted(twice)[0]} is made twice")
        save_file(tensors, folder / name, metadata={"format": "pt"})
        # It makes files for their owner only; whoever may read the folder may read them.
        (folder / name).chmod(0o666 & ~_umask())
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        progress(f"{name}: {len(tensors)} tensors, {number} of {len(shards)} files")
        del tensors
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(places), total


def _umask() -> int:
    """Returns the umask of the process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_code(folder: Path, mone: MoNEConfig, model: ModelConfig) -> None:
    """Writes our model class as files that transformers loads with ``trust_remote_code=True``.

    They are this package's own, and the files of the score, the rule, the gate and the router, with
    their imports turned into imports of the files beside them.

    Raises:
        ValueError: one of these four is of another package and needs more of this one than an
            export holds.
    """
    # A dense model has the usual router, whatever its settings say.
    router = model.router.kind if model.num_experts else "topk"
    chosen_of: dict[str, tuple[Registry[Any], str]] = {
        "neuron_score": (SCORES, mone.score),
        "neuron_rule": (RULES, mone.rule),
        "expert_gate": (GATES, model.gate),
        "expert_router": (ROUTERS, router),
    }
    for name, path in _CODE.items():
        text = _beside((_PACKAGE / path).read_text(encoding="utf-8"))
        assert "from mone_megatron" not in text, name
        (folder / name).write_text(text, encoding="utf-8")
    for name, (_, constant, file) in _REGISTRIES.items():
        registry, chosen = chosen_of[file]
        method, key = registry.file_of(chosen), registry.key
        text = _beside(method.read_text(encoding="utf-8"))
        if re.search(r"^\s*(from|import) mone_megatron", text, re.MULTILINE):
            beside = [path[:-3].replace("/", ".") for path in _CODE.values() if "/methods/" in path]
            raise ValueError(
                f"{key}: {chosen} cannot be exported: its file {method} needs more of "
                f"mone_megatron than {', '.join(beside)}"
            )
        (folder / f"{file}.py").write_text(text, encoding="utf-8")
        text = _REGISTRY.format(file=file, name=constant, key=key)
        (folder / name).write_text(text, encoding="utf-8")


def _beside(text: str) -> str:
    """Returns code of ours with imports of the files that lie beside it in an export."""
    modules = {path.removesuffix(".py").replace("/", "."): file for file, path in _CODE.items()}
    modules |= {package: file for file, (package, _, _) in _REGISTRIES.items()}
    for module, file in modules.items():
        text = text.replace(f"from {module} import", f"from .{file.removesuffix('.py')} import")
    return text
