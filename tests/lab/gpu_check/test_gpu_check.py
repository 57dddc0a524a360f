"""The checks of a first GPU: what they find is written, whatever one of them does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mone_megatron.commands.gpu_check import main
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.lab.gpu_check.checks import Check, all_checks, missing
from mone_megatron.lab.gpu_check.runner import FAILED, LATE, LEFT, PASSED, Result, run_all
from mone_megatron.testing.launch import REPOSITORY, import_path


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def _run(checks: list[Check], folder: Path, *, minutes: float = 1.0) -> list[Result]:
    return run_all(checks, folder, minutes=minutes, gpu=False, say=lambda line: None)


def test_a_failure_stops_nothing_and_a_limit_ends_a_check(tmp_path: Path) -> None:
    written = tmp_path / "own.json"
    written.write_text('"of an earlier run"', encoding="utf-8")
    killed = _python("import os; print('at work', flush=True); os.kill(os.getpid(), 11)")
    checks = [
        Check("is killed", "", killed, 20, (), "", written),
        Check("is killed at once", "", _python("import os; os.kill(os.getpid(), 11)"), 20),
        Check("fails", "", _python("raise SystemExit('no such kernel')"), 20),
        Check("hangs", "", _python("import time; print('begun', flush=True); time.sleep(99)"), 2),
        Check("needs", "", _python("print(1)"), 20, ("gpu",)),
        Check("tells", "", _python("print('text'); print('{\"speed\": 2.5}')"), 20),
        Check("file", "", _python(f"open({str(written)!r}, 'w').write('[1]')"), 20, (), "",
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
    (result,) = _run([Check("late", "", _python("print(1)"), 20)], tmp_path, minutes=0.1)
    assert (result.status, result.why) == (LEFT, "the 0.1 minutes are over")


def test_results_are_there_after_each_check(tmp_path: Path) -> None:
    look = (
        f"import json; page = open({str(tmp_path / 'gpu_check.md')!r}).read();"
        "assert '- not begun: second' in page;"
        f"print(len(json.load(open({str(tmp_path / 'gpu_check.json')!r}))))"
    )
    checks = [Check("first", "", _python("print(0)"), 20), Check("second", "", _python(look), 20)]
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
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --only: kernel: no such check; use some of machine, ")
    assert second == "error: --minutes: 0 is too little; use 8"


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


def test_the_kernels_check_sees_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from mone_megatron.kernels import reference
    from mone_megatron.lab.gpu_check.kernels import Case, compare

    cases = [Case(48), Case(48, "fp32", odd="ties"), Case(40, packed=True), Case(48, odd="nan")]
    for case in cases:
        assert compare(case, rows=6, device="cpu") is None
    right = reference.kept_mask

    def highest_of_ties(gate: torch.Tensor, *rest: object) -> torch.Tensor:
        mask = right(gate, *rest)  # type: ignore[arg-type]
        assert mask is not None
        return mask.roll(1, dims=-1)

    monkeypatch.setattr(reference, "kept_mask", highest_of_ties)
    assert compare(cases[1], rows=6, device="cpu") is not None
