"""What the plugin selects by is the training package's definition, by text and by bits."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from mone_megatron.hf.experts_mone import NeuronSettings
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "serving" / "vllm"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install serving/vllm` installs, unpacked."""
    folder = tmp_path_factory.mktemp("plugin")
    # From a copy: building leaves folders beside the sources.
    copy = folder / "repository" / "serving" / "vllm"
    copy.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(PLUGIN), str(copy)], check=True)
    for built in ("build", "mone_vllm/definition"):
        subprocess.run(["rm", "-rf", str(copy / built)], check=True)
    (folder / "repository" / "mone_megatron").symlink_to(REPOSITORY / "mone_megatron")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, str(copy), "--wheel-dir", str(folder)], check=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def selection(wheel: Path) -> Iterator[ModuleType]:
    """The plugin's module of that name; it needs no vLLM."""
    sys.path.insert(0, str(wheel))
    yield importlib.import_module("mone_vllm.selection")
    sys.path.remove(str(wheel))
    for name in [name for name in sys.modules if name.split(".")[0] == "mone_vllm"]:
        del sys.modules[name]


def test_every_file_of_the_definition_is_the_training_packages(wheel: Path) -> None:
    folder = wheel / "mone_vllm" / "definition"
    files = [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[-1:]]
    made = {folder / "__init__.py", *folder.glob("*/__init__.py")}
    assert {path.stem for path in folder.glob("methods/rules/*.py")} >= set(RULES.names)
    assert {path.stem for path in folder.glob("methods/scores/*.py")} >= set(SCORES.names)
    for path in set(files) - made:
        name = path.relative_to(folder)
        text = (REPOSITORY / "mone_megatron" / name).read_text(encoding="utf-8")
        for package in ("kernels", "methods"):
            text = text.replace(f"mone_megatron.{package}", f"mone_vllm.definition.{package}")
        assert path.read_text(encoding="utf-8") == text, name


def test_the_distribution_needs_nothing_and_is_found_by_vllm(wheel: Path) -> None:
    (facts,) = wheel.glob("mone_vllm-*.dist-info")
    assert "Requires-Dist" not in (facts / "METADATA").read_text(encoding="utf-8")
    entry_points = (facts / "entry_points.txt").read_text(encoding="utf-8")
    assert "[vllm.general_plugins]\nmone = mone_vllm:register" in entry_points


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES.names)
@pytest.mark.parametrize("score", SCORES.names)
def test_masks_are_bitwise_those_of_an_export_in_transformers(
    selection: ModuleType, score: str, rule: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    for neurons, keep_ratio in ((128, 0.25), (96, 0.0104), (64, 0.984), (72, 0.4)):
        gate, up = (
            # Few values: most rows tie at the threshold.
            (torch.randint(-8, 9, (257, neurons), generator=generator) / 4).to(dtype)
            for _ in range(2)
        )
        norm = torch.rand(neurons, generator=generator)
        # Of three experts, the last of which has learned nothing yet.
        state = {
            name: torch.rand(3, generator=generator) * torch.tensor([1, 1, 0])
            for name in RULES[rule].state
        }
        expert = torch.randint(3, (257,), generator=generator)
        mone = {"keep_ratio": keep_ratio, "score": score, "rule": rule}
        try:
            expected = NeuronSettings.from_config(mone).mask(
                gate,
                up,
                F.silu,
                down_norm=lambda norm=norm: norm,
                state=state,
                expert_T=expert,
            )
        except ValueError:
            with pytest.raises(ValueError, match=r"mone\."):
                selection.Selection.of(mone, "routed", neurons, F.silu, None)
            continue
        chosen = selection.Selection.of(mone, "routed", neurons, F.silu, None)
        mask = chosen.mask(gate, up, down_norm_TF=norm, state=state, expert_T=expert, num_experts=3)
        assert torch.equal(mask, expected)


_KERNEL_AND_DEFINITION = """
import torch
from mone_vllm.definition.kernels import fused, reference
values = torch.randint(-8, 9, (16, 96)) / 4
for dtype in (torch.float32, torch.bfloat16):
    given = values.to(dtype)
    assert torch.equal(fused.topk_mask(given, 24), reference.topk_mask(given, 24))
"""


def test_the_kernel_that_cuda_takes_gives_the_same_mask(wheel: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # In a process of its own, where Triton is imported for its interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(wheel)}
    command = [sys.executable, "-c", _KERNEL_AND_DEFINITION]
    done = subprocess.run(
        command, env=environment, cwd=wheel, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class _Ranks:
    """Two ranks' columns, as the second of them sees both."""

    rank, size = 1, 2

    def __init__(self, first: torch.Tensor) -> None:
        self.first = first

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first, part], dim=-1)


def test_neurons_on_two_ranks_are_ranked_together(selection: ModuleType) -> None:
    scores = torch.randint(0, 5, (64, 32), generator=torch.Generator().manual_seed(1)).float()
    mone = {"keep_ratio": 0.25, "score": "signed_gate"}
    alone = selection.Selection.of(mone, "routed", 32, F.silu, None)
    second = selection.Selection.of(mone, "routed", 32, F.silu, _Ranks(scores[:, :16]))
    mask = second.mask(scores[:, 16:], scores[:, 16:])
    assert torch.equal(mask, alone.mask(scores, scores)[:, 16:])


@pytest.mark.parametrize(
    ("mone", "message"),
    [
        ({"score": "abs_aktivation"}, "mone.score: 'abs_aktivation' is unknown; did you mean"),
        ({"rule": "top_k"}, "mone.rule: 'top_k' is unknown; did you mean topk"),
        ({"keep_ratio": 0.0}, r"mone.keep_ratio: 0.0 is not in \(0, 1\]"),
        ({"keep_ratio": 0.001}, "mone.keep_ratio: 0.001 of 32 neurons keeps none"),
        ({"renormalise": True}, "config.mone.renormalise: unknown to this mone-vllm"),
    ],
)
def test_unknown_settings_are_refused_by_name(
    selection: ModuleType, mone: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        selection.Selection.of({"keep_ratio": 0.25} | mone, "routed", 32, F.silu, None)
