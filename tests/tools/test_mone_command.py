"""``mone``: its list, what it hands on, its completions, and that a wheel holds what it needs."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from mone_megatron.commands.experiments import experiments
from mone_megatron.commands.mone import COMMANDS, main
from mone_megatron.testing.launch import REPOSITORY, start_in_session

MONE = [
    sys.executable,
    "-c",
    "import sys; from mone_megatron.commands.mone import main; sys.exit(main())",
]


def mone(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MONE, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_it_lists_them(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in told
        assert command.does in told


def test_the_list_and_the_completions_load_nothing_heavy() -> None:
    checked = (
        "import sys; from mone_megatron.commands.mone import main; main([]); main(['train']);"
        "main(['__complete', '--line', 'mone train optim.']);"
        "sys.exit(' '.join({'torch', 'hydra', 'megatron', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", checked], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_every_tool_is_one(name: str) -> None:
    module = COMMANDS[name].module
    assert callable(importlib.import_module(module).main)
    if name != "train":  # tools/ has none: python -m mone_megatron.pretrain
        assert (REPOSITORY / "tools" / f"{module.rpartition('.')[2]}.py").is_file()


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == 2
    assert capsys.readouterr().err == "error: exprot: no such command; did you mean export?\n"


def test_it_hands_on_arguments_name_and_status() -> None:
    done = mone("plan", "experiment=tiny_mone", "--gpuz", "2")
    assert done.returncode == 2
    assert "--gpuz" in done.stderr
    assert mone("compare", "--help").stdout.startswith("usage: mone compare ")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_train_without_a_word_lists_the_experiments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 0
    told = capsys.readouterr().out
    for option in ("--processes N ", "--dry-run[=N] ", "-m, --multirun "):
        assert f"  {option}" in told
    assert max(map(len, told.split("experiments:")[0].splitlines())) <= 100
    files = {path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")}
    assert set(experiments()) == files
    for name, sentence in experiments().items():
        assert sentence
        assert f"  {name} " in told


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("mone ex", ["export"]),
        ("mone train experiment=tiny_", ["tiny_moe", "tiny_mone"]),
        ("mone train mone.keep_ratio", ["mone.keep_ratio=", "mone.keep_ratio_schedule="]),
        ("mone train experiment=tiny_mone --dry-run data=std", ["stdlib"]),
        ("mone completion z", ["zsh"]),
        ("mone generate ru", []),
    ],
)
def test_bash_completes(line: str, some: list[str], tmp_path: Path) -> None:
    """In a real bash, with the script that users evaluate."""
    command = tmp_path / "mone"
    command.write_text(f"#!{sys.executable}\n{MONE[2]}\n")
    command.chmod(0o755)
    script = (
        f'PATH="{tmp_path}:$PATH"; eval "$(mone completion bash)"; COMP_LINE="{line}";'
        'COMP_POINT=${#COMP_LINE}; compopt() { :; }; _mone; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    found = done.stdout.split()
    assert set(some) <= set(found)
    if not some:
        assert found == []


def test_completion_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--help"]) == 0
    assert 'eval "$(mone completion bash)"' in capsys.readouterr().out
    assert main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "error: completion: name a shell: bash, zsh, fish\n"


def test_a_dry_run_checks_everything_and_trains_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ("train", "experiment=tiny_mone", f"run.dir={run}")
    done = mone(*given, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "1 process, 4 microbatches a step" in done.stdout
    assert "20 steps of 512 tokens: 10,240" in done.stdout
    assert f"{run}: new" in done.stdout
    assert not run.exists()
    several = mone(*given, "parallel.expert=4", "--dry-run=4")
    assert "4 processes (expert 4, data 4)" in several.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dry-run=none"], "--dry-run=none: names no number of processes; write --dry-run=8"),
        (["--dry-run", "-m"], "-m: not with --dry-run; check one run, without it"),
        (["--dry-run=3", "parallel.expert=2"], "parallel.expert: world size 3 is not a multiple"),
        (["--dry-run", "data=indexed", "data.paths=[no]"], "data.paths[0]: no.bin does not exist"),
    ],
)
def test_what_a_dry_run_refuses(arguments: list[str], told: str) -> None:
    done = mone("train", "experiment=tiny_mone", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told}")


def test_a_wheel_holds_the_experiments(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("mone_megatron", "conf", "launch"):
        shutil.copytree(
            REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels"]
    subprocess.run([*build, "./source"], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("wheels/*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r});"
        "from mone_megatron.commands.mone import main; sys.exit(main())"
    )
    for arguments in (["train"], ["plan", "experiment=tiny_mone", "--gpu", "H100"]):
        done = subprocess.run(
            [sys.executable, "-c", installed, *arguments],
            cwd=elsewhere,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "tiny_mone" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "two"], "--processes: 'two' is no number of processes; use 1 or more"),
        (["--processes=0"], "--processes: '0' is no number"),
        (["--processes=2", "parallel.expert=4"], "parallel.expert: world size 2 is not a"),
    ],
)
def test_processes_that_cannot_be(arguments: list[str], told: str) -> None:
    done = mone("train", "experiment=tiny_mone", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["-m", "train.seed=1,2"], ["--processes", "2"]])
def test_ctrl_c_while_it_starts_is_one_line(options: list[str], tmp_path: Path) -> None:
    """Imports take seconds, and a thought about the command comes in just those."""
    run = start_in_session(
        [*MONE, "train", "experiment=tiny_mone", f"run.dir={tmp_path}/run", *options]
    )
    assert run.stdout is not None
    # Then it imports torch.
    assert run.stdout.readline()
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert (run.returncode, err.count("\n")) == (130, 1), err
    assert err.startswith("error: interrupted")


def test_ctrl_c_in_the_first_imports_of_a_run(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [
            *(sys.executable, "-X", "importtime", "-m", "mone_megatron.pretrain"),
            *("experiment=tiny_mone", f"run.dir={tmp_path}/run"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    while "omegaconf" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in run.communicate(timeout=300)[1]
    assert run.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize("name", ["plan", "export"])
def test_ctrl_c_in_the_imports_of_a_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def import_module(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", import_module)
    try:
        assert main([name, "experiment=tiny_mone"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "error: interrupted\n"


def test_processes_of_one_command_end_without_a_traceback(tmp_path: Path) -> None:
    command = [
        *(*MONE, "train", "--processes", "2", "experiment=tiny_mone", "device=cpu"),
        *("train.steps=100000", "checkpoint=auto", f"run.dir={tmp_path}/run"),
        *("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=lines"),
    ]
    run = start_in_session(command)
    assert run.stdout is not None
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 300
    while run.poll() is None and time.monotonic() < until:
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.2)
    # As a terminal does it: to every process.
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "Traceback" not in err
    *_, stopped, go_on = [line for line in (out + err).splitlines() if line]
    step = int(stopped.removeprefix("stopped by SIGINT after step ").split()[0])
    folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
    assert go_on == f"saved to {folder}; the same command goes on from there"
    assert folder.is_dir()
