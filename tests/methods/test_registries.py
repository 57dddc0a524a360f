"""The registries themselves: names without torch, unknown names, and methods of other packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.hooks import HOOKS
from mone_megatron.methods.losses import LOSSES
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.registry import Registry
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.methods.sources import SOURCES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES

REGISTRIES: tuple[Registry, ...] = (
    ACTIVATIONS,
    DENSITY_STEPS,
    GATES,
    HOOKS,
    LOSSES,
    OPTIMIZERS,
    ROUTERS,
    RULES,
    SCORES,
    SOURCES,
    SPARSITY_LOSSES,
)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_every_method_says_what_it_is(registry: Registry) -> None:
    assert len(registry) > 0
    for method in registry:
        assert registry[method.name] is method
        assert method.formula
        assert method.source


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_an_unknown_name_is_an_error_with_the_key(registry: Registry) -> None:
    with pytest.raises(ValueError, match=f"^{registry.key}: 'no_such_method' is unknown; use"):
        registry["no_such_method"]
    near = registry.names[0] + "x"
    with pytest.raises(ValueError, match=f"did you mean {registry.names[0]}\\?"):
        registry[near]


def python(code: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *([str(site)] if site else [])]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_names_need_no_torch() -> None:
    code = (
        "from mone_megatron.config.load import compose\n"
        "compose(['experiment=tiny_mone', 'mone.score=wina', 'model.activation=relu2'])\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    assert python(code).stderr == ""


def install(site: Path, files: dict[str, str], entries: Iterable[str]) -> None:
    """Makes what pip would make of a package with these modules and entry points."""
    for name, text in files.items():
        (site / f"{name}.py").write_text(text)
    info = site / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[mone_megatron.methods]", *entries, ""]))


SCORE = """
from mone_megatron.methods.score import Score

def loud(neurons):
    return neurons.gate.abs() + 1

METHOD = Score(name="NAME", formula="|g| + 1", source="a test", function=loud,
               reads=frozenset({"gate"}))
"""
LIST = "from mone_megatron.methods.scores import SCORES; print(*SCORES.names)"


def test_an_installed_package_adds_methods(tmp_path: Path) -> None:
    install(tmp_path, {"theirs": SCORE.replace("NAME", "loud")}, ["loud = theirs:METHOD"])
    assert "loud" in python(LIST, tmp_path).stdout.split()
    composed = python(
        "from mone_megatron.config.load import compose\n"
        "print(compose(['experiment=tiny_mone', 'mone.score=loud']).mone.score)",
        tmp_path,
    )
    assert composed.stdout == "loud\n", composed.stderr


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        # A name of ours, a module that is not there, an attribute that is not there.
        ("abs_gate", "a = theirs:METHOD", "mone.score: 'abs_gate' is defined twice"),
        ("loud", "a = nowhere:METHOD", "nowhere:METHOD of their_methods, cannot be loaded"),
        ("loud", "a = theirs:NOTHING", "theirs:NOTHING of their_methods, cannot be loaded"),
    ],
)
def test_a_package_that_cannot_be_taken_is_named(
    tmp_path: Path, name: str, entry: str, message: str
) -> None:
    install(tmp_path, {"theirs": SCORE.replace("NAME", name)}, [entry])
    run = python(LIST, tmp_path)
    assert run.returncode == 1
    assert message in run.stderr.splitlines()[-1]
