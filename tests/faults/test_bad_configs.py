"""Row 19: a configuration that cannot run is refused by its key before torch is even imported."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from bad_configs import BadConfig, bad_configs
from faults_runs import Ended, Main, attempt, mains, pretrain
from faults_table import Tally

Count = Callable[[int, str], AbstractContextManager[Tally]]
REFUSED = "configurations that cannot run: refused by key before torch is imported"


def _main(config: BadConfig) -> Main:
    size, overrides, _ = config
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return Main(("experiment=tiny_mone", "device=cpu", *overrides), ranks)


def assert_refused(ended: Ended, key: str) -> None:
    ended.assert_refused(f"error: {key}: ")
    assert not ended.torch, "torch was imported before the refusal"
    assert all(";" in line or "did you mean" in line for line in ended.errors), ended.said
    assert "0123456789" not in ended.said, "a secret's value was shown"


def test_configurations_that_cannot_run(tmp_path: Path, tally: Count, full: bool) -> None:
    wanted = bad_configs()
    assert len(wanted) >= 200
    if not full:
        wanted = wanted[::5]
    jobs = {" ".join(config[1]) + f" on {config[0]}": _main(config) for config in wanted}
    ended = mains(jobs, tmp_path, watch=False)
    with tally(19, REFUSED) as t:
        for (name, one), (_, _, key) in zip(ended.items(), wanted, strict=True):
            with attempt(t, name):
                assert_refused(one, key)
        t.note = f"at most {max(one.seconds for one in ended.values()):.2f} s each, imports aside"


@pytest.mark.parametrize(
    ("override", "key"),
    [("train.steps=0", "train.steps"), ("train.step=5", "train.step"), ("optim=sgd", "optim")],
)
def test_in_a_process_of_its_own(tally: Count, override: str, key: str) -> None:
    with tally(19, "the same, `python -m mone_megatron.pretrain`") as t, attempt(t, override):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        ended = pretrain("experiment=tiny_mone", override)
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        t.note = f"after {seconds:.1f} s ({cpu:.1f} s of processor time)"
        ended.assert_refused(f"error: {key}: ")


def test_a_device_that_is_not_there(tmp_path: Path, tally: Count) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    jobs = {"cuda": Main(("experiment=tiny_mone", "device=cuda"))}
    with tally(19, "CUDA asked for and not there: refused before a process group") as t:
        for name, ended in mains(jobs, tmp_path).items():
            with attempt(t, name):
                ended.assert_refused("error: device.kind: ")
                assert not ended.opened
