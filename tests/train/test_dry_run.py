"""A dry run asks what the run would ask: of the machine, of the folder and of the checkpoint."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python
from mone_megatron.train.run_directory import check_can_be_made

RUN = (
    "experiment=tiny_mone", "device.threads=1", "train.steps=2", "data.max_megabytes=0.2",
    "checkpoint.interval=1", "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false",
)  # fmt: skip


def pretrain(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "mone_megatron.pretrain", *RUN, *overrides]
    return run_python(command, folder=REPOSITORY, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("megatron.ddp.nccl_ub=true", "megatron.ddp.nccl_ub: it needs NCCL, which is for GPUs"),
        ("device.kind=cuda", "device.kind: cuda, and this machine has no CUDA device"),
        (
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_grad_reduce: overlaps CUDA streams; use false on a CPU",
        ),
    ],
)
def test_what_this_machine_cannot_do(override: str, told: str, tmp_path: Path) -> None:
    folder = f"run.dir={tmp_path}/run"
    dry, real = pretrain(override, folder, "--dry-run"), pretrain(override, folder)
    assert dry.returncode == real.returncode == 2
    assert dry.stderr.startswith(f"error: {told}")
    assert dry.stderr in real.stderr


def test_of_another_machine_nothing_is_asked(tmp_path: Path) -> None:
    """A run of so many processes may be for a cluster; what its configuration says is known."""
    given = ("megatron.ddp.nccl_ub=true", f"run.dir={tmp_path}/run", "--dry-run=2")
    done = pretrain(*given)
    assert done.returncode == 0, done.stderr
    assert "auto; of the machine that it runs on nothing was asked" in done.stdout
    assert "megatron.ddp.nccl_ub: it needs NCCL" in pretrain("device=cpu", *given).stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = pretrain(f"run.dir={tmp_path}/file/run", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: run.dir: cannot use '{tmp_path}/file/run' (Not a dir")


def test_the_checkpoint_that_it_would_begin_with(tmp_path: Path) -> None:
    run = ("device=cpu", f"run.dir={tmp_path}/run")
    assert pretrain(*run).returncode == 0
    saved = tmp_path / "run" / "checkpoints" / "step_00000001"
    for overrides, told in (
        ((), "begins at step 0"),
        ((f"checkpoint.resume={saved}",), f"goes on from {saved} after step 1"),
        (("checkpoint.resume=auto",), "step_00000002 after step 2"),
        (
            (f"checkpoint.initialize={saved}", "train.seed=2"),
            f"begins with the weights of {saved}",
        ),
        ((f"checkpoint.resume={saved}", "optim.lr=1e-4"), "optim.lr: 0.001 saved, 0.0001"),
    ):
        dry = pretrain(*run, *overrides, "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert told in dry.stdout
    # Refused in the words of the run itself.
    for overrides, told in (
        (("checkpoint.resume=auto", "train.seed=2"), "train.seed: 1234 saved, 2 configured"),
        (("checkpoint.resume=auto", "mone.keep_ratio=0.5"), "mone.keep_ratio: 0.25 saved, 0.5"),
        ((f"checkpoint.resume={saved}", "device.dtype=bf16"), "dtype: 'torch.float32' saved"),
        (("checkpoint.resume=no",), "checkpoint.resume: no is not there; name a checkpoint"),
        (
            (f"checkpoint.resume={saved}/manifest.json",),
            f"checkpoint.resume: {saved}/manifest.json is no folder",
        ),
        (("checkpoint.initialize=no",), "checkpoint.initialize: no is not there"),
        (
            (f"checkpoint.initialize={saved}", "model.num_experts=4"),
            "model.num_experts: 8 in the checkpoint, 4 configured",
        ),
    ):
        dry, real = pretrain(*run, *overrides, "--dry-run"), pretrain(*run, *overrides)
        assert dry.returncode == real.returncode == 2
        assert dry.stderr.startswith(f"error: {told}")
        assert dry.stderr in real.stderr


@pytest.mark.parametrize("folder", ["/proc/here/run", "/dev/null/run"])
def test_where_no_folder_can_be_made(folder: str) -> None:
    """Also to root, who may write everywhere and still cannot."""
    with pytest.raises(
        ValueError, match=rf"^run\.dir: cannot use '{folder}' \(.*\); name another$"
    ):
        check_can_be_made(Path(folder))


def test_looking_whether_a_folder_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    check_can_be_made(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
