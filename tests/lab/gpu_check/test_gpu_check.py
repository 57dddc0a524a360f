"""The checks of a first GPU: what they find is written, whatever one of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from mone_megatron.commands.bench import main as bench
from mone_megatron.commands.gpu_check import main
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.lab.gpu_check.checks import Check, all_checks, missing
from mone_megatron.lab.gpu_check.fake_step import summary
from mone_megatron.lab.gpu_check.runner import FAILED, LATE, LEFT, PASSED, Result, run_all
from mone_megatron.testing.launch import REPOSITORY, import_path
from mone_megatron.testing.warm_start import run_python


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def _run(checks: list[Check], folder: Path, *, minutes: float = 30.0) -> list[Result]:
    return run_all(checks, folder, minutes=minutes, gpu=False, say=lambda line: None)


def test_a_failure_stops_nothing_and_a_limit_ends_a_check(tmp_path: Path) -> None:
    written = tmp_path / "own.json"
    written.write_text('"of an earlier run"', encoding="utf-8")
    killed = _python("import os; print('at work', flush=True); os.kill(os.getpid(), 11)")
    checks = [
        Check("is killed", "", killed, 300, (), "", written),
        Check("is killed at once", "", _python("import os; os.kill(os.getpid(), 11)"), 300),
        Check("fails", "", _python("raise SystemExit('no such kernel')"), 300),
        # A shell has begun long before, on a busy machine, too.
        Check("hangs", "", ("sh", "-c", "echo begun; exec sleep 600"), 2),
        Check("needs", "", _python("print(1)"), 300, ("gpu",)),
        Check("tells", "", _python("print('text'); print('{\"speed\": 2.5}')"), 300),
        Check("file", "", _python(f"open({str(written)!r}, 'w').write('[1]')"), 300, (), "",
              written),
    ]  # fmt: skip
    killed, at_once, *results = _run(checks, tmp_path)
    assert (killed.status, killed.found) == (FAILED, None)
    assert killed.why == "was killed by SIGSEGV; its last line: at work"
    assert (at_once.status, at_once.why) == (FAILED, "was killed by SIGSEGV")
    assert [r.status for r in results] == [FAILED, LATE, LEFT, PASSED, PASSED]
    assert results[0].why == "no such kernel"
    assert results[1].why == "stopped after 2 seconds"
    assert results[1].output == "begun\n"
    assert results[2].why == "there is no GPU"
    assert results[3].found == {"speed": 2.5}
    assert results[4].found == [1]
    kept = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert [entry["status"] for entry in kept][2:] == [r.status for r in results]
    page = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    assert "| tells |  | passed |" in page
    assert "- failed: is killed, is killed at once, fails\n- out of time: hangs\n" in page
    assert "- left out: needs\n" in page
    assert "speed 2.5" in page


def test_what_has_no_time_is_left(tmp_path: Path) -> None:
    (result,) = _run([Check("late", "", _python("print(1)"), 300)], tmp_path, minutes=0.1)
    assert (result.status, result.why) == (LEFT, "the 0.1 minutes are over")


def test_results_are_there_after_each_check(tmp_path: Path) -> None:
    look = (
        f"import json; page = open({str(tmp_path / 'gpu_check.md')!r}).read();"
        "assert '- not begun: second' in page;"
        f"print(len(json.load(open({str(tmp_path / 'gpu_check.json')!r}))))"
    )
    checks = [Check("first", "", _python("print(0)"), 300), Check("second", "", _python(look), 300)]
    assert _run(checks, tmp_path)[1].found == 1


def test_the_command_runs_what_can_be_run_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", import_path(REPOSITORY))
    folder = tmp_path / "out"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--output", str(folder), "--only", "machine", "layer", "engine"]) == 0
    told = capsys.readouterr()
    assert "left: layer (there is no GPU); engine (there is no GPU)" in told.out
    assert "machine: passed" in told.err
    (machine, *_) = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    assert machine["found"]["versions"]["torch"] == torch.__version__


def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "a"), "--only", "kernel"]) == 2
    assert main(["--output", str(tmp_path / "a"), "--minutes", "0"]) == 2
    assert main(["--output", str(tmp_path / "a"), "--minutes", "nan"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --only: kernel: no such check; use some of machine, ")
    assert second == "error: --minutes: 0 is no time; use 8"
    assert third == "error: --minutes: nan is no time; use 8"


@pytest.mark.parametrize("gpu", [True, False])
def test_every_check_names_needs_that_are_known(tmp_path: Path, gpu: bool) -> None:
    checks = all_checks(tmp_path, gpu=gpu)
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        for need in check.needs:
            missing(need, gpu=gpu)


def test_what_is_trained_fits_one_gpu(tmp_path: Path) -> None:
    commands = [check.command for check in all_checks(tmp_path, gpu=True)]
    trained = [command for command in commands if "speed" in command]
    assert len(trained) == 3
    for command in trained:
        overrides = [word for word in command if "=" in word]
        config = compose([*overrides, "device.kind=cuda"])
        layout = validate(
            config,
            world_size=1,
            num_devices=1,
            local_world_size=1,
            have_transformer_engine=True,
        )
        assert layout.num_microbatches == 2


def test_each_adam_is_asked_to_resume(tmp_path: Path) -> None:
    checks = {check.name: check for check in all_checks(tmp_path, gpu=True)}
    assert "resume" in checks["resume"].command
    assert checks["resume"].needs == ()
    assert "resume_te" in checks["resume_te"].command
    assert "transformer_engine" in checks["resume_te"].needs
    for check in checks.values():
        assert check.expected or check.name == "machine", f"{check.name}: nothing is expected"


def _installed(folder: Path) -> Path:
    """A Transformer Engine that has nothing but an Adam, and imports it itself."""
    package = folder / "transformer_engine" / "pytorch" / "optimizers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class FusedAdam: ...\n", encoding="utf-8")
    text = "from transformer_engine.pytorch import optimizers\n"
    (package.parent / "__init__.py").write_text(text, encoding="utf-8")
    (package.parents[1] / "__init__.py").touch()
    return folder


def test_torchs_adam_is_chosen_where_another_is_installed(tmp_path: Path) -> None:
    found = """
        from mone_megatron.lab.gpu_check.with_adam import leave_torchs_alone
        {before}
        try:
            from transformer_engine.pytorch.optimizers import FusedAdam
        except ImportError:
            FusedAdam = None
        import transformer_engine.pytorch
        print(FusedAdam is None)
    """
    package = _installed(tmp_path)
    told = [
        subprocess.run(
            _python(dedent(found).format(before=before)),
            env=os.environ | {"PYTHONPATH": import_path(REPOSITORY, package)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for before in ("", "leave_torchs_alone()")
    ]
    assert told == ["False\n", "True\n"]


def test_a_run_with_another_adam_than_the_one_that_was_asked_for_fails(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = (
        *("experiment=tiny_mone", "device=cpu", "train.steps=1", "data.max_megabytes=0.2"),
        *("logging.wandb.mode=disabled", "logging.report=false", f"run.dir={tmp_path / 'run'}"),
    )
    module = "mone_megatron.lab.gpu_check.with_adam"
    done = run_python(["-m", module, "transformer_engine", *run], folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "error: Adam is of torch.optim.adamw, not of transformer_engine" in done.stderr
    done = run_python(["-m", module, "apex", *run], folder=tmp_path)
    assert done.returncode == 2
    assert "error: apex: no such Adam; use torch or transformer_engine" in done.stderr


@pytest.mark.parametrize("name", ["select", "layer", "decode"])
def test_benchmarks_are_told_beside_their_bounds(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.json"
    small = {
        "select": ("--rows", "64", "--neurons", "64"),
        "layer": ("--hidden", "64", "--neurons", "64", "--experts", "4", "--chosen", "2",
                  "--tokens", "64"),
        "decode": ("--hidden", "64", "--neurons", "64", "--experts", "4", "--chosen", "2"),
    }[name]  # fmt: skip
    assert bench([name, *small, "--repeats", "1", "--output", str(path)]) == 0
    (check,) = (check for check in all_checks(tmp_path, gpu=True) if check.name == name)
    written = json.loads(path.read_text(encoding="utf-8"))
    told = check.shown(written)
    assert {
        "select": lambda: list(told) == ["f=64:"] and "torch's" in told["f=64:"],
        "layer": lambda: told["MoNE:"].endswith(" times MoE") and "MoE:" not in told,
        "decode": lambda: told["batch 1, r=0.125:"].endswith(" times as fast of 2.4"),
    }[name]()
    if name == "select":
        written["hardware"] = "NVIDIA H100 80GB HBM3"
        # 64 rows of 64 scores of 2 bytes and a mask of 1, at 3.35 TB/s.
        bound = 3 * 64 * 64 / 3.35e12 * 1e3
        times = written["result"][0]["ours_milliseconds"]["median"] / bound
        assert f"{times:.3g} times the memory bound" in check.shown(written)["f=64:"]


@pytest.mark.parametrize(
    ("place", "kind", "outside", "good"),
    [
        ("megatron/core/transformer/moe/moe_utils.py:1 permute", "wait", 0, True),
        ("mone_megatron/train/step.py:1 f", "wait", 3, True),
        ("mone_megatron/train/step.py:1 f", "wait", 4, False),
        ("mone_megatron/methods/rules/mass.py:1 f", "wait", 0, False),
        ("mone_megatron/mone/layer.py:1 f", "fault", 0, False),
    ],
)
def test_the_fake_step_is_told_in_a_few_numbers(
    place: str, kind: str, outside: int, good: bool
) -> None:
    line = {"kind": kind, "what": "item of fp32", "place": place, "ours": place}
    written = {
        "found": {"step": [line | {"count": max(1, outside)}]},
        "compiled_before": 5,
        "compiled_later": [],
        "microbatches": 2,
        "moe_layers": 4,
        "groups": 3,
        "optimizers": [{"class": "AdamW", "fused": True}],
    }
    found, all_right = summary(written)
    assert all_right is good
    assert found["outside of layers"] == outside
    assert found["Adam"] == "AdamW, fused"
    assert ("the first that it would refuse" in found) is (kind == "fault")
    written["compiled_later"] = ["a kernel"]
    assert not summary(written)[1]


def test_the_kernels_check_sees_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from mone_megatron.kernels import fused, reference
    from mone_megatron.lab.gpu_check.kernels import Case, compare

    cases = [Case(48), Case(48, "fp32", odd="ties"), Case(40, packed=True), Case(48, odd="nan")]
    by_rule = Case(64, score="abs_gate", odd="ties", rule="blocks")
    cases.append(by_rule)
    for case in cases:
        assert compare(case, rows=6, device="cpu") is None
    right = reference.kept_mask

    def highest_of_ties(gate: torch.Tensor, *rest: object) -> torch.Tensor:
        mask = right(gate, *rest)  # type: ignore[arg-type]
        assert mask is not None
        return mask.roll(1, dims=-1)

    monkeypatch.setattr(reference, "kept_mask", highest_of_ties)
    assert compare(cases[1], rows=6, device="cpu") is not None
    monkeypatch.setattr(fused, "topk_mask", lambda *given: reference.topk_mask(*given).roll(1, -1))
    assert compare(by_rule, rows=6, device="cpu") == "the mask differs from the CPU's"
