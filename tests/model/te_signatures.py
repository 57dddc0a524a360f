"""Records which arguments Transformer Engine's functions take, and finds megatron-core's calls.

Its library is compiled for one torch and one Python, so the tests cannot import it; what it takes
stands in its sources. ``python tests/model/te_signatures.py FOLDER`` reads them in a clone with
tags and writes ``te_signatures.json`` anew.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
# The first that te_grouped.py is written for, and the newest when this was recorded.
VERSIONS = ("2.11", "2.18")
_MODULE = "te.pytorch."
# By the name that megatron-core or we call it: file and name in Transformer Engine.
_SOURCES = {
    "general_grouped_gemm": ("cpp_extensions/gemm.py", "general_grouped_gemm"),
    "FusedAdam": ("optimizers/fused_adam.py", "FusedAdam"),
    "RMSNorm": ("module/rmsnorm.py", "RMSNorm"),
    "LayerNorm": ("module/layernorm.py", "LayerNorm"),
    "Linear": ("module/linear.py", "Linear"),
    "LayerNormLinear": ("module/layernorm_linear.py", "LayerNormLinear"),
    "GroupedLinear": ("module/grouped_linear.py", "GroupedLinear"),
    "DotProductAttention": (
        "attention/dot_product_attention/dot_product_attention.py",
        "DotProductAttention",
    ),
    "apply_rotary_pos_emb": ("attention/rope.py", "apply_rotary_pos_emb"),
    "fused_permute": ("permutation.py", "moe_permute"),
    "fused_permute_with_probs": ("permutation.py", "moe_permute_with_probs"),
    "fused_unpermute": ("permutation.py", "moe_unpermute"),
    "fused_sort_chunks_by_index": ("permutation.py", "moe_sort_chunks_by_index"),
    "fused_sort_chunks_by_index_with_probs": (
        "permutation.py",
        "moe_sort_chunks_by_index_with_probs",
    ),
    "fused_topk_with_score_function": ("router.py", "fused_topk_with_score_function"),
    "fused_compute_score_for_moe_aux_loss": ("router.py", "fused_compute_score_for_moe_aux_loss"),
    "fused_moe_aux_loss": ("router.py", "fused_moe_aux_loss"),
    "make_graphed_callables": ("graph.py", "make_graphed_callables"),
}


def _arguments(source: str, name: str) -> str:
    """Returns the arguments of a function, or of a class's ``__init__``, without annotations."""
    node = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
    )
    if isinstance(node, ast.ClassDef):
        node = next(
            part
            for part in node.body
            if isinstance(part, ast.FunctionDef) and part.name == "__init__"
        )
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for extra in (arguments.vararg, arguments.kwarg):
        if extra is not None:
            extra.annotation = None
    nothing = ast.Constant(None)
    arguments.defaults = [nothing for _ in arguments.defaults]
    arguments.kw_defaults = [default and nothing for default in arguments.kw_defaults]
    return ast.unparse(arguments).removeprefix("self, ")


def record(clone: Path) -> None:
    """Writes the record from a clone of Transformer Engine."""
    signatures = {}
    for version in VERSIONS:
        for called, (file, name) in _SOURCES.items():
            place = f"v{version}:transformer_engine/pytorch/{file}"
            command = ["git", "-C", str(clone), "show", place]
            source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            signatures.setdefault(version, {})[called] = _arguments(source, name)
    RECORD.write_text(json.dumps(signatures, indent=2) + "\n", encoding="utf-8")


def signature(version: str, called: str) -> inspect.Signature:
    """Returns the recorded signature."""
    arguments = json.loads(RECORD.read_text(encoding="utf-8"))[version][called]
    space: dict[str, object] = {}
    exec(f"def recorded({arguments}): pass", space)
    return inspect.signature(space["recorded"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """Describes one call in megatron-core's sources, as far as it can be read."""

    called: str
    place: str
    positional: int
    named: tuple[str, ...]
    # Whether it also hands on arguments that only a run would know.
    more: bool


def calls() -> Iterator[Call]:
    """Yields megatron-core's calls of what is recorded."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.submodule_search_locations
    core = Path(spec.submodule_search_locations[0])
    for path in sorted(core.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if any(name in source for name in (_MODULE, "fused_", "apply_rotary_pos_emb")):
            tree = ast.parse(source)
            bases = {
                id(inner): ast.unparse(base).removeprefix(_MODULE)
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                for base in node.bases
                if ast.unparse(base).startswith(_MODULE)
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                function = ast.unparse(node.func)
                if function == "super().__init__":
                    called = bases.get(id(node), "")
                elif function.startswith(_MODULE):
                    # te.pytorch.ops holds others by the same names.
                    called = function.removeprefix(_MODULE)
                # megatron-core's own function has the name of Transformer Engine's elsewhere.
                elif function != "apply_rotary_pos_emb" or path.name == "transformer_engine.py":
                    called = function
                else:
                    called = ""
                if called in _SOURCES:
                    yield Call(
                        called,
                        f"{path.relative_to(core)}:{node.lineno}",
                        sum(not isinstance(argument, ast.Starred) for argument in node.args),
                        tuple(keyword.arg for keyword in node.keywords if keyword.arg),
                        any(isinstance(argument, ast.Starred) for argument in node.args)
                        or any(keyword.arg is None for keyword in node.keywords),
                    )


if __name__ == "__main__":
    record(Path(sys.argv[1]))
