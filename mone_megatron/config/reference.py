"""Makes the reference of the configuration's keys from the schema: tables and a JSON Schema.

``python tools/config_reference.py`` writes the tables into ``docs/configuration.md`` and the JSON
Schema, by which editors complete and check YAML files, to ``docs/config.schema.json``.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mone_megatron.config.marks import Bound, NameIn, OptionsOf
from mone_megatron.config.schema import Config

BEGIN = "<!-- The keys: written by tools/config_reference.py -->"
END = "<!-- The end of the keys -->"

_WORDS = {bool: "true/false", int: "integer", float: "number", str: "text"}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_PAGE = re.compile(r"\bdocs/([\w-]+\.md)(#[\w-]+)?")
# A value that stands for another key's: ${model.hidden_size}.
_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}


@dataclass(frozen=True)
class Field:
    """Describes one field of a group.

    Attributes:
        name: the field's name, without the group.
        kind: its type, without marks.
        marks: what its annotation says beside the type.
        default: the value where none is given.
        text: its documentation, one paragraph; "" for a section.
    """

    name: str
    kind: Any
    marks: tuple[Any, ...]
    default: Any
    text: str

    @property
    def is_section(self) -> bool:
        """Returns whether it holds fields of its own."""
        return dataclasses.is_dataclass(self.kind)

    @property
    def is_open(self) -> bool:
        """Returns whether it holds names that are not the schema's."""
        return get_origin(self.kind) is collections.abc.Mapping

    @property
    def bounds(self) -> list[Bound]:
        """Returns the bounds among the marks."""
        return [mark for mark in self.marks if isinstance(mark, Bound)]

    @property
    def options(self) -> list[tuple[Field, list[str]]]:
        """Returns what methods declare for an open field, each with the names of those that do."""
        found: dict[Field, list[str]] = {}
        for mark in self.marks:
            if isinstance(mark, OptionsOf):
                for method in mark.methods:
                    for option in fields(method.options):
                        found.setdefault(option, []).append(method.name)
        return sorted(found.items(), key=lambda pair: pair[0].name)


def fields(cls: type) -> Iterator[Field]:
    """Yields the fields of a group in their order.

    Raises:
        ValueError: for a field without documentation below it.
    """
    texts = _texts(cls)
    defaults = cls()
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if name not in texts and not dataclasses.is_dataclass(kind):
            raise ValueError(f"{cls.__name__}.{name}: not documented; write a sentence below it")
        yield Field(name, kind, tuple(marks), getattr(defaults, name), texts.get(name, ""))


def _texts(cls: type) -> dict[str, str]:
    """Returns the text that stands below each field in the source, by the field's name."""
    # A field may be of a class that this one derives from.
    inherited: dict[str, str] = {}
    for base in reversed(cls.__bases__):
        if dataclasses.is_dataclass(base):
            inherited |= _texts(base)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return inherited | {
        statement.target.id: " ".join(text.value.value.split())
        for statement, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def write_tables(page: str) -> str:
    """Returns a Markdown page with the tables of all keys between its two marks.

    Raises:
        ValueError: for a page without the marks.
    """
    before, found, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"the page has no place for the keys; write {BEGIN} and {END} into it")
    return f"{before}{BEGIN}\n\n{_tables()}\n{END}{after}"


def _tables() -> str:
    """Returns a heading, a sentence and a table for each group."""
    lines: list[str] = []
    for group in fields(Config):
        lines += [f"### {group.name}", "", _linked(_summary(group.kind)), ""]
        lines += ["| key | default | value | what it does |", "|---|---|---|---|"]
        lines += [*_rows(group.kind, f"{group.name}."), ""]
    return "\n".join(lines)


def _rows(cls: type, prefix: str) -> Iterator[str]:
    for field in fields(cls):
        key = f"{prefix}{field.name}"
        if field.is_section:
            yield from _rows(field.kind, f"{key}.")
            continue
        default = "" if field.is_open else f"`{_yaml(field.default)}`"
        cells = [f"`{key}{'.NAME' if field.is_open else ''}`", default, _value(field)]
        cells.append(_linked(field.text))
        yield _row(cells)
        for option, names in field.options:
            cells = [f"`{key}.{option.name}`", f"`{_yaml(option.default)}`", _value(option)]
            yield _row([*cells, f"Of {_listed(names)}. {_linked(option.text)}"])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _summary(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def _linked(text: str) -> str:
    """Returns the text with links to the pages of this documentation that it names."""
    return _PAGE.sub(lambda match: f"[{match[1]}]({match[1]}{match[2] or ''})", text)


def _value(field: Field) -> str:
    """Returns what a field takes, in words."""
    words = [_kind_words(field.kind, field.marks), *(bound.words for bound in field.bounds)]
    return ", ".join(words)


def _kind_words(kind: Any, marks: tuple[Any, ...], *, several: bool = False) -> str:
    if get_origin(kind) is Annotated:
        return _kind_words(get_args(kind)[0], get_args(kind)[1:], several=several)
    for mark in marks:
        if isinstance(mark, NameIn):
            folder = mark.registry.package.partition(".")[2].replace(".", "/")
            return f"{'files' if several else 'a file'} of `{folder}`"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(kind))
    if get_origin(kind) is collections.abc.Mapping:
        return "text, number or true/false"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return f"list of {_kind_words(items[0], (), several=True)}"
        return f"{len(items)} {_kind_words(items[0], ())}s"
    return _WORDS[kind]


def _yaml(value: Any) -> str:
    """Returns a default as a YAML file or the command line has it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if value != "" else '""'


def json_schema() -> str:
    """Returns the JSON Schema of a whole configuration, as text; ``$defs`` holds the groups.

    It knows one field at a time: bounds stand in it of fields without effect, too.
    """
    definitions = {group.name: _object_schema(group.kind) for group in fields(Config)}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run of mone_megatron: config.yaml of a run, and files of conf/experiment",
        "type": "object",
        "properties": {
            **{name: {"$ref": f"#/$defs/{name}"} for name in definitions},
            "defaults": {"type": "array", "description": "Options that Hydra composes."},
            "hydra": {"type": "object", "description": "Hydra's own settings."},
        },
        "additionalProperties": False,
        "$defs": definitions,
    }
    return json.dumps(schema, indent=2) + "\n"


def _object_schema(cls: type) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for field in fields(cls):
        if field.is_section:
            properties[field.name] = _object_schema(field.kind)
            continue
        value = _value_schema(field)
        properties[field.name] = {
            "description": field.text,
            "default": list(field.default) if isinstance(field.default, tuple) else field.default,
            **value,
        }
        if field.options:
            properties[field.name]["properties"] = _options_schema(field)
    return {
        "type": "object",
        "description": _summary(cls),
        "properties": properties,
        "additionalProperties": False,
    }


def _options_schema(field: Field) -> dict[str, Any]:
    """Returns what each option of an open field may be; which method has it is left open."""
    found: dict[str, list[dict[str, Any]]] = {}
    for option, names in field.options:
        held = _value_schema(option)
        text = f"Of {', '.join(names)}. {option.text}"
        found.setdefault(option.name, []).append({"description": text, **held})
    return {
        name: schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        for name, schemas in found.items()
    }


def _value_schema(field: Field) -> dict[str, Any]:
    limits = {key: held for bound in field.bounds for key, held in bound.json_schema.items()}
    value = _kind_schema(field.kind) | limits
    # Text takes an interpolation as it is.
    if value.get("type") != "string" or "enum" in value:
        value = {"anyOf": [value, _INTERPOLATION]}
    return value


def _kind_schema(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is Annotated:
        return _kind_schema(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return {"type": "string", "enum": list(get_args(kind))}
    if get_origin(kind) is collections.abc.Mapping:
        scalars = [_JSON_TYPES[scalar] for scalar in (str, float, bool)]
        return {"type": "object", "additionalProperties": {"type": scalars}}
    if get_origin(kind) is tuple:
        items = get_args(kind)
        schema: dict[str, Any] = {"type": "array", "items": _kind_schema(items[0])}
        if items[-1] is not Ellipsis:
            schema |= {"minItems": len(items), "maxItems": len(items)}
        return schema
    return {"type": _JSON_TYPES[kind]}
