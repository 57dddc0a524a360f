"""What the plugin selects by is the training package's definition, by text and by bits."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from mone_megatron.config.load import compose
from mone_megatron.hf.architectures import MONE
from mone_megatron.hf.experts_mone import ExpertRows, NeuronSettings
from mone_megatron.hf.settings import hidden_act, to_hf_config
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.testing.each_method import needed

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
def plugin(wheel: Path) -> Iterator[None]:
    """Its modules can be imported; those that are here need no vLLM."""
    sys.path.insert(0, str(wheel))
    yield
    sys.path.remove(str(wheel))
    for name in [name for name in sys.modules if name.split(".")[0] == "mone_vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def selection(plugin: None) -> ModuleType:
    """The plugin's module of that name."""
    return importlib.import_module("mone_vllm.selection")


def exported_config(*overrides: str) -> PreTrainedConfig:
    """Returns the configuration that an export of such a model has."""
    config = compose(["experiment=tiny_mone", *overrides])
    return to_hf_config(
        config.model,
        config.mone,
        architecture=MONE,
        vocab_size=64,
        max_positions=64,
        dtype="float32",
        token_ids={},
    )


def asked(**given: Any) -> SimpleNamespace:
    """Returns what of vLLM's configuration the plugin reads."""
    usual = {"quant_config": None, "lora_config": None, "eplb": False}
    assert given.keys() <= usual.keys()
    held = usual | given
    held["parallel_config"] = SimpleNamespace(enable_eplb=held.pop("eplb"))
    return SimpleNamespace(**held)


PRODUCT_KEYS = (
    "mone.enabled=false", "model.experts=product_key", "model.num_experts=0",
    "model.product_key.keys=16",
)  # fmt: skip
# Overrides -> what is refused, and how it is named: every router, gate and activation that exports
# hold beside the usual ones, and what has no registry.
NOT_SERVED: dict[tuple[str, ...], str] = {
    PRODUCT_KEYS: "product_key: single-neuron experts are not written for vLLM",
    ("model=deepseek_v2_lite",): "attention_type=mla: multi-latent attention",
    **{
        (f"model.router.kind={router.name}", *needed(f"model.router.kind={router.name}")): (
            f"router_kind={router.name}: tokens are sent by megatron-core's own router alone"
        )
        for router in ROUTERS
        if router.causal and router.reference is None
    },
    **{
        (f"model.gate={gate}",): f"gate={gate}: experts have one matrix for their gates"
        for gate in GATES.names
        if gate != "full"
    },
    **{
        (f"model.activation={activation.name}",): "rectified_up: dReLU is not written for vLLM"
        for activation in ACTIVATIONS
        if activation.up is not None and activation.rectified_gate
    },
}


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize("overrides", NOT_SERVED, ids=lambda overrides: overrides[-1])
def test_what_is_not_written_for_vllm_is_refused_by_name(overrides: tuple[str, ...]) -> None:
    refuse = importlib.import_module("mone_vllm.refusals").refuse
    with pytest.raises(ValueError, match=re.escape(NOT_SERVED[overrides])) as raised:
        refuse(exported_config(*overrides), asked(), graphs=False)
    assert ";" not in str(raised.value)  # nothing else of it


@pytest.mark.usefixtures("plugin")
def test_what_was_asked_of_vllm_is_refused_by_name_and_the_rest_is_served() -> None:
    refuse = importlib.import_module("mone_vllm.refusals").refuse
    refuse(exported_config(), asked(), graphs=True)
    for given, named in (
        (asked(quant_config="fp8"), "quantization: quantised experts compute all neurons"),
        (asked(lora_config="a"), "LoRA: adapters of experts compute all neurons"),
        (asked(eplb=True), "--enable-eplb: experts that move between ranks"),
    ):
        with pytest.raises(ValueError, match=named):
            refuse(exported_config(), given, graphs=False)
    for rule in RULES:
        config = exported_config(f"mone.rule={rule.name}")
        refuse(config, asked(), graphs=False)
        if rule.state:
            with pytest.raises(ValueError, match=f"mone.rule={rule.name} in CUDA graphs"):
                refuse(config, asked(), graphs=True)
    # Several at once are all named.
    with pytest.raises(ValueError, match=r"product_key: .*; LoRA: "):
        refuse(exported_config(*PRODUCT_KEYS), asked(lora_config="a"), graphs=False)


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
    served = 0
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
                rows=ExpertRows(expert, torch.arange(257), torch.ones(257)),
            )
        except ValueError:
            with pytest.raises(ValueError, match=r"mone\."):
                selection.Selection.of(mone, "routed", neurons, F.silu, None)
            continue
        if RULES[rule].pools:
            with pytest.raises(ValueError, match=f"mone.rule: {rule} ranks the neurons of all"):
                selection.Selection.of(mone, "routed", neurons, F.silu, None)
            continue
        chosen = selection.Selection.of(mone, "routed", neurons, F.silu, None)
        mask = chosen.mask(gate, up, down_norm_TF=norm, state=state, expert_T=expert, num_experts=3)
        assert torch.equal(mask, expected)
        served += 1
    # Served somewhere, or refused for what it is.
    assert (served > 0) == (RULES[rule].causal and not RULES[rule].pools)


# What CUDA computes, in Triton's interpreter, beside what every other device does.
_ON_TRITON = """
import torch
from mone_vllm import selection
from mone_vllm.definition.kernels import fused
from mone_vllm.definition.methods.activations import ACTIVATIONS
from mone_vllm.definition.methods.rules import RULES
from mone_vllm.definition.methods.scores import SCORES
generator = torch.Generator().manual_seed(3)
calls = 0
# tests/kernels compares all numbers, which takes its time.
fused.scores_equal_torch = lambda activate, device: True
def both(compute):
    results = []
    for chosen in (True, False):
        selection.on_triton = lambda tensor: chosen
        results.append(compute())
    return results
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    # In bf16 many scores tie without help.
    values = torch.randn(3, 2 * 32, generator=generator).to(dtype)
    norm = torch.rand(32, generator=generator)
    state = {name: torch.rand(1) for rule in RULES for name in rule.state}
    for activation in ACTIVATIONS:
        if activation.up is not None:
            continue
        activate = selection.activation_of(activation.name)
        for rule in RULES:
            if not rule.causal or rule.pools:
                continue
            # Other rules are given scores of torch's.
            for score in SCORES if rule.top_k else [SCORES["abs_gate"]]:
                mone = {"keep_ratio": 0.5, "rule": rule.name, "score": score.name}
                chosen = selection.Selection.of(mone, "routed", 32, activate, None)
                rows = {"down_norm_TF": norm, "state": state}
                ours, expected = both(lambda: chosen.hidden(values, **rows))
                assert ours.dtype is dtype
                # Exactly the same are kept; products are rounded once, not twice.
                assert torch.equal(ours == 0, expected == 0), (rule.name, score.name, dtype)
                torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-6)
                calls += 1
    ours, expected = both(lambda: selection.topk_mask(values, 24))
    assert torch.equal(ours, expected)
print(calls)
"""


def _on_the_wheel(wheel: Path, command: list[str], interpret: str) -> str:
    # In a process of its own, where Triton is imported for its interpreter or for its compiler.
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=wheel,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_cuda_computes_is_the_definition(wheel: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    calls = int(_on_the_wheel(wheel, ["-c", _ON_TRITON], "1"))
    served = sum(
        len(SCORES) if rule.top_k else 1 for rule in RULES if rule.causal and not rule.pools
    )
    activations = sum(activation.up is None for activation in ACTIVATIONS)
    assert calls == 3 * activations * served


def test_what_cuda_launches_compiles_for_a_gpu(wheel: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    script = Path(__file__).with_name("compile_for_cuda.py")
    compiled = json.loads(_on_the_wheel(wheel, [str(script)], "0"))
    kept = {json.loads(line.partition(" ")[2]).get("KEEP") for line in compiled}
    # The selection within the product, a given mask, and the mask alone.
    assert {"top", "mask"} <= kept
    assert any(line.startswith("topk_mask_kernel") for line in compiled)
    with_scores = [line for line in compiled if '"SCORE": "' in line]
    fused = {score.fused.partition(":")[2] for score in SCORES if score.fused is not None}
    assert {json.loads(line.partition(" ")[2])["SCORE"] for line in with_scores} == fused


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("score", ["abs_activation", "abs_gate", "signed_gate"])
def test_gathered_rows_give_what_whole_products_do(
    selection: ModuleType, score: str, tokens: int
) -> None:
    gather = importlib.import_module("mone_vllm.gather")
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = (torch.randn(4, n, 16, generator=generator) for n in (2 * 24, 24))
    mone = {"keep_ratio": 0.25, "score": score}
    chosen = selection.Selection.of(mone, "routed", 24, F.silu, None)
    x = torch.randn(tokens, 16, generator=generator)
    # One expert of the last token is another rank's.
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    ids[-1, 1] = -1
    weights = torch.rand(tokens, 2, generator=generator)
    expected = torch.zeros(tokens, 16)
    for token, places in enumerate(ids.tolist()):
        for place, expert in enumerate(places):
            if expert >= 0:
                hidden = chosen.hidden(F.linear(x[token : token + 1], gate_up[expert]))
                expected[token] += weights[token, place] * (hidden @ down[expert])[0]
    rows = gather.GatheredRows.of(chosen, gate_up, down)
    torch.testing.assert_close(rows.compute(x, weights, ids), expected)


@pytest.mark.parametrize(("keep_ratio", "most"), [(0.125, 64), (0.25, 64), (0.5, 8), (0.75, 2)])
def test_rows_are_gathered_where_that_was_measured_to_be_faster(
    selection: ModuleType, keep_ratio: float, most: int
) -> None:
    """Of eight experts, as many rows as pay."""
    gather = importlib.import_module("mone_vllm.gather")
    chosen = selection.Selection.of({"keep_ratio": keep_ratio}, "routed", 1408, F.silu, None)
    gate_up, down = (torch.empty(8, n, 2048, device="meta") for n in (2 * 1408, 1408))
    rows = gather.GatheredRows.of(chosen, gate_up, down)
    assert [rows.pays(n, 1) for n in (0, 1, most, most + 1)] == [False, True, True, False]
    small = gather.GatheredRows.of(chosen, gate_up[..., :64], down[..., :64])
    assert not small.pays(1, 1)


class _Ranks:
    """Two ranks' columns, as one of them sees both; what they sum is told beforehand."""

    size = 2

    def __init__(self, rank: int, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.rank, self.parts = rank, parts
        # What each rank adds to each sum, in the order of the calls.
        self.added: list[torch.Tensor] = []
        self.others: list[torch.Tensor] | None = None

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        if part.shape != self.parts[self.rank].shape:  # sums of blocks
            size = self.parts[0].shape[-1] // part.shape[-1]
            return torch.cat([each.unflatten(-1, (-1, size)).sum(-1) for each in self.parts], -1)
        assert torch.equal(part, self.parts[self.rank])
        return torch.cat(self.parts, dim=-1)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.added.append(part)
        return part if self.others is None else part + self.others[len(self.added) - 1]


def _on_two_ranks(
    selection: ModuleType, mone: dict[str, object], scores: torch.Tensor
) -> torch.Tensor:
    """The mask of neurons that two ranks share."""
    parts = scores.chunk(2, dim=-1)
    added: list[list[torch.Tensor]] = [[], []]
    masks = []
    # Sums may be of sums: as many turns as there are, each with what the other rank then added.
    for _ in range(4):
        masks = []
        for rank, part in enumerate(parts):
            ranks = _Ranks(rank, parts)
            ranks.others = [*added[1 - rank], *[torch.zeros(())] * 8]
            chosen = selection.Selection.of(mone, "routed", scores.shape[-1], F.silu, ranks)
            masks.append(chosen.mask(part, part))
            added[rank] = ranks.added
    return torch.cat(masks, dim=-1)


@pytest.mark.parametrize("rule", RULES.names)
def test_neurons_on_two_ranks_are_selected_together_or_refused(
    selection: ModuleType, rule: str
) -> None:
    # Small integers: sums are exact in any order, and many tie.
    scores = torch.randint(0, 5, (64, 32), generator=torch.Generator().manual_seed(1)).float()
    mone: dict[str, object] = {"keep_ratio": 0.5, "score": "signed_gate", "rule": rule}
    budget = RULES[rule].budget(0.5, 32)
    if (problem := RULES[rule].shard_problem(budget, 2)) or not RULES[rule].causal:
        with pytest.raises(ValueError, match=problem or f"mone.rule: {rule} looks at other"):
            _on_two_ranks(selection, mone, scores)
        return
    alone = selection.Selection.of(mone, "routed", 32, F.silu, None)
    assert torch.equal(_on_two_ranks(selection, mone, scores), alone.mask(scores, scores))


@pytest.mark.parametrize("name", ACTIVATIONS.names)
def test_every_activation_is_that_of_transformers_or_is_never_exported(
    selection: ModuleType, name: str
) -> None:
    gate = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    exported = hidden_act(name)
    if exported in ACT2FN:
        assert torch.equal(selection.activation_of(exported)(gate), ACT2FN[exported](gate))
        return
    with pytest.raises(ValueError, match=f"model.activation: transformers has no {name}"):
        exported_config(f"model.activation={name}")


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
