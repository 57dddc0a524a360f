"""megatron-core 0.16.1 and a later one beside it compute the same, and read one another or say so.

``make test`` puts the later one into a folder and names it in MEGATRON_NEXT; both run in this
environment, on the same machine, so losses must be the same to the last bit.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from close_records import RECORDED_TOLERANCE, assert_close_until_a_flip
from record_losses import RECORDED, SETTINGS, essence, prepare_corpus, read_records

from mone_megatron.megatron_release import megatron_release
from mone_megatron.testing.launch import REPOSITORY, import_path, run_layouts
from mone_megatron.testing.layouts import LAYOUTS
from mone_megatron.testing.warm_start import run_python

NEXT = os.environ.get("MEGATRON_NEXT", "")
# As many as are recorded, where any are; a difference in the last bit shows in the first few.
STEPS = {"one": 20, "ep2": 20, "prediction": 10, "tp2_ep1_etp1": 10, "pp2": 10}
ON_TWO = ("ep2", "tp2_ep1_etp1", "pp2")
# Whose layers the releases name, number and log differently.
PREDICTION = "model.mtp.depth=1"
# What goes on with the later release, by processes: experts on two ranks, and an optimizer whose
# moments are spread over them, too.
GOES_ON = {1: ("one", "prediction"), 2: ("ep2",)}
RESUMED = ("resumed", "old")

pytestmark = [
    pytest.mark.skipif(not NEXT, reason="MEGATRON_NEXT names no folder (make test sets it)"),
    pytest.mark.skipif(megatron_release() >= (0, 17, 0), reason="0.16.1 is not installed"),
]


def with_next() -> dict[str, str]:
    """The environment in which the later release is found first."""
    return {"PYTHONPATH": import_path(Path(NEXT).resolve(), REPOSITORY)}


@dataclass(frozen=True)
class Trained:
    """Runs of both releases: ``old-LAYOUT`` and ``new-LAYOUT``, and what they read."""

    folder: Path
    corpus: tuple[str, ...]

    def job(self, layout: str, *overrides: str) -> tuple[str, ...]:
        """A run's overrides; it saves in the middle and at the end."""
        steps = STEPS[layout]
        saving = (f"checkpoint.interval={steps // 2}", "checkpoint.keep_last=2")
        settings = (*SETTINGS, f"train.steps={steps}", *saving)
        return ("experiment=tiny_mone", *settings, *self.corpus, *overrides)

    def middle(self, release: str, layout: str) -> Path:
        """The checkpoint in the middle of a run."""
        step = f"step_{STEPS[layout] // 2:08d}"
        return self.folder / f"{release}-{layout}" / "checkpoints" / step


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """All runs of the earlier release, then those of the later, which starts cold: once a size."""
    folder = tmp_path_factory.mktemp("releases")
    trained = Trained(folder, prepare_corpus(folder))
    settings = {
        1: {"one": LAYOUTS[1]["one"], "prediction": (PREDICTION,)},
        2: {name: LAYOUTS[2][name] for name in ON_TWO},
    }
    for processes, named in settings.items():
        old = {f"old-{name}": trained.job(name, *overrides) for name, overrides in named.items()}
        run_layouts(old, processes=processes, folder=folder)
        new = {f"new-{name}": trained.job(name, *overrides) for name, overrides in named.items()}
        for name in GOES_ON[processes]:
            resume = f"checkpoint.resume={trained.middle('old', name)}"
            new[f"resumed-{name}"] = trained.job(name, *named[name], resume)
        run_layouts(new, processes=processes, folder=folder, variables=with_next())
    return trained


@pytest.mark.parametrize("layout", ["one", "prediction", *ON_TWO])
def test_both_releases_train_the_same(trained: Trained, layout: str) -> None:
    old, new = (read_records(trained.folder / f"{kind}-{layout}") for kind in ("old", "new"))
    assert len(old) == STEPS[layout]
    assert essence(new) == essence(old)
    # Sums over the layers' auxiliary losses, which 0.19 keeps elsewhere.
    for name in ("router/load_balancing_loss", "mone/balance_loss", "mtp/loss"):
        assert [record.get(name) for record in new] == [record.get(name) for record in old]
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["runs"]
    if expected := recorded.get(f"tiny_mone {layout}"):
        assert_close_until_a_flip(expected, essence(new), loss=RECORDED_TOLERANCE)


def test_each_checkpoint_names_its_release(trained: Trained) -> None:
    named = {}
    for kind in ("old", "new"):
        text = (trained.middle(kind, "one") / "manifest.json").read_text("utf-8")
        named[kind] = json.loads(text)["manifest"]["facts"]["megatron-core"]
    assert named["old"] == "0.16.1"
    assert named["new"].startswith("0.19.")


def test_a_run_goes_on_with_the_later_release_to_the_last_bit(trained: Trained) -> None:
    for name in (*GOES_ON[1], *GOES_ON[2]):
        resumed, whole = (read_records(trained.folder / f"{run}-{name}") for run in RESUMED)
        rest = whole[STEPS[name] // 2 :]
        assert essence(resumed) == essence(rest)
        assert [record.get("mtp/loss") for record in resumed] == [
            record.get("mtp/loss") for record in rest
        ]


def test_the_earlier_release_says_that_it_cannot_read_the_later_ones(trained: Trained) -> None:
    checkpoint = trained.middle("new", "one")
    done = run_python(
        [
            *("-m", "mone_megatron.pretrain"),
            *trained.job("one", f"checkpoint.resume={checkpoint}", "device=cpu"),
            f"run.dir={trained.folder / 'back'}",
        ],
        environment={"OMP_NUM_THREADS": "1"},
        folder=REPOSITORY,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert str(checkpoint) in line
    assert "a newer megatron-core than the installed 0.16.1 wrote it" in line


def test_the_later_release_says_nothing_more_on_the_terminal(trained: Trained) -> None:
    for processes in (1, 2):
        said = (trained.folder / f"rank-{processes}-0.log").read_text(encoding="utf-8")
        # The fixture's last runs were of the later release.
        for notice in ("Rewrapping", "deprecated", "DEPRECATED", "Warning:", "not provided"):
            assert notice not in said, said
