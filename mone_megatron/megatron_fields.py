"""Reads the settings of the installed megatron-core from its source, and imports none of it.

Its dataclasses say which fields there are and of which type. A run can then be refused before torch
is imported, whatever release is installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mone_megatron.megatron_release import megatron_folder

Scalar = str | int | float | bool

# Part of the group `megatron` -> (file, class) of megatron-core; of a model with multi-latent
# attention the class is another.
CLASSES: Mapping[str, tuple[str, str]] = {
    "transformer": ("transformer/transformer_config.py", "TransformerConfig"),
    "optimizer": ("optimizer/optimizer_config.py", "OptimizerConfig"),
    "ddp": (
        "distributed/distributed_data_parallel_config.py",
        "DistributedDataParallelConfig",
    ),
}
MLA_CLASS = ("transformer/transformer_config.py", "MLATransformerConfig")


@dataclass(frozen=True)
class Field:
    """Describes one field of a dataclass.

    Attributes:
        annotation: its type as it is written.
        types: the plain types that a value may be of.
        choices: the values that it may have, where the type lists them.
    """

    annotation: str
    types: frozenset[type]
    choices: tuple[Scalar, ...]

    def takes(self, value: Scalar) -> bool:
        """Returns whether the type allows a value. A whole number is allowed for a float."""
        if value in self.choices and type(value) in {type(choice) for choice in self.choices}:
            return True
        return type(value) in self.types or (type(value) is int and float in self.types)


@cache
def fields_of(file: str, name: str) -> Mapping[str, Field]:
    """Returns the fields of one dataclass of the installed megatron-core, those of its bases first.

    Args:
        file: the path of the source file, relative to ``megatron/core``.
        name: the name of the class.

    Raises:
        ValueError: when megatron-core is not installed, or has no such class.
    """
    path = megatron_folder() / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            break
    else:
        raise ValueError(f"{path} has no class {name}")
    fields: dict[str, Field] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            fields |= fields_of(_file_of(base.id, tree, file), base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = _field(statement.annotation)
    return fields


def _file_of(name: str, tree: ast.Module, file: str) -> str:
    """Returns the file, relative to ``megatron/core``, in which a base class stands."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            parts = (node.module or "").split(".")
            if node.level:
                folder = Path(file).parent
                for _ in range(node.level - 1):
                    folder = folder.parent
                return folder.joinpath(*parts).with_suffix(".py").as_posix()
            assert parts[:2] == ["megatron", "core"], node.module
            return Path(*parts[2:]).with_suffix(".py").as_posix()
    return file


def _field(annotation: ast.expr) -> Field:
    types: set[type] = set()
    choices: list[Scalar] = []
    for kind in _kinds(annotation):
        if isinstance(kind, type):
            types.add(kind)
        else:
            choices.append(kind.value)
    return Field(ast.unparse(annotation), frozenset(types), tuple(choices))


@dataclass(frozen=True)
class _Choice:
    value: Scalar


_PLAIN: Mapping[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def _kinds(annotation: ast.expr) -> Iterator[type | _Choice]:
    """Yields what a type allows of what a configuration can say; lists, functions are left out."""
    if isinstance(annotation, ast.Name) and annotation.id in _PLAIN:
        yield _PLAIN[annotation.id]
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _kinds(ast.parse(annotation.value, mode="eval").body)
    elif isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _kinds(annotation.left)
        yield from _kinds(annotation.right)
    elif isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inside = annotation.slice
        parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if annotation.value.id in ("Optional", "Union"):
            for part in parts:
                yield from _kinds(part)
        elif annotation.value.id == "Literal":
            for part in parts:
                if isinstance(part, ast.Constant) and isinstance(part.value, Scalar):
                    yield _Choice(part.value)
