"""Row 6: a run goes on in another layout: its state bitwise, its next losses to rounding."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from faults_helpers import PATIENCE, QUIET, end, records, start, state_digest, step_folder
from faults_table import Tally

from mone_megatron.testing.ports import free_ports

SCRIPT = Path(__file__).with_name("recorded_run.py")
TOLERANCE = 1e-6
# Ranks and overrides. Batches of 12 in microbatches of 2: a data-parallel size of 1, 2 or 3.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "ep2": (2, ("parallel.expert=2",)),
    "tp2": (2, ("parallel.tensor=2",)),
    "tp2 etp2": (2, ("parallel.tensor=2", "parallel.expert_tensor=2")),
    "etp2": (2, ("parallel.expert_tensor=2",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "dp3": (3, ()),
    "tp2 ep4": (4, ("parallel.tensor=2", "parallel.expert=4")),
    "pp2 ep2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
    "tp2 ep2 etp2": (
        4,
        ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2"),
    ),
}
# A walk over the layouts, each change in it another one.
WALK = (
    *("one", "dp2", "ep2", "dp2", "one", "ep2", "one", "tp2", "dp3", "tp2 ep4", "pp2"),
    *("pp2 ep2", "tp2 etp2", "ep2", "etp2", "pp2", "dp3", "one", "tp2 ep2 etp2", "dp2", "pp2 ep2"),
)


def run_jobs(jobs: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Train each in ``folder/NAME``; all jobs of one size in the same processes, in order."""
    sizes = sorted({LAYOUTS[name.split(" to ")[-1]][0] for name in jobs})
    for size in sizes:
        chosen = [name for name in jobs if LAYOUTS[name.split(" to ")[-1]][0] == size]
        listed = [
            {
                "overrides": [*jobs[name], f"run.dir={folder / name}"],
                "port": port,
                "save_at_start": " to " in name,
            }
            for name, port in zip(chosen, free_ports(len(chosen)), strict=True)
        ]
        file = folder / f"jobs-{size}-{len(jobs)}.json"
        file.write_text(json.dumps(listed), encoding="utf-8")
        codes, said = end(start([str(SCRIPT), str(file)], processes=size), 8 * PATIENCE)
        assert codes == [0] * size, said[-6000:]


def test_twenty_changes_of_layout(
    full: bool,
    tally: Callable[[int, str], AbstractContextManager[Tally]],
    tmp_path: Path,
) -> None:
    if not full:
        pytest.skip("with --faults-full; tests/integration/test_resume.py has fewer changes")
    first, after = 10, 50
    changes = list(itertools.pairwise(WALK))
    assert len(set(changes)) == len(changes) == 20
    common = (
        *("experiment=tiny_mone", "device=cpu", *QUIET),
        *("train.global_batch_size=12", "train.micro_batch_size=2", "train.seq_length=32"),
        *(f"train.steps={first + after}", f"checkpoint.interval={first}"),
        *("checkpoint.keep_last=100", "logging.layer_interval=1"),
    )
    # Each layout's own run, never interrupted.
    whole = {name: (*common, *LAYOUTS[name][1]) for name in dict.fromkeys(WALK)}
    # Its checkpoint taken up in the next layout, saved at once, and trained on.
    changed = {
        f"{old} to {new}": (
            *common,
            *LAYOUTS[new][1],
            f"checkpoint.resume={step_folder(tmp_path / old, first)}",
        )
        for old, new in changes
    }
    run_jobs(whole, tmp_path)
    run_jobs(changed, tmp_path)
    with tally(6, "changes of layout: weights and moments bitwise") as t:
        for (old, _), name in zip(changes, changed, strict=True):
            saved = state_digest(step_folder(tmp_path / old, first))
            t.check(state_digest(step_folder(tmp_path / name, first)) == saved, name)
    apart, flips = {}, {}
    for (old, _), name in zip(changes, changed, strict=True):
        expected, actual = records(tmp_path / old)[first:], records(tmp_path / name)
        assert [one["step"] for one in actual] == list(range(first + 1, first + after + 1))
        apart[name] = [
            abs(two["loss"] - one["loss"]) / one["loss"]
            for one, two in zip(expected, actual, strict=True)
        ]
        flips[name] = first_flip(expected, actual)
    # The weaker promise, which says where the stronger one below ends.
    with tally(6, f"losses within {TOLERANCE:g} until rounding chooses another neuron") as t:
        for name in changed:
            before = apart[name][: flips[name]]
            t.check(
                max(before, default=0.0) <= TOLERANCE, f"{name}: {max(before, default=0.0):.1e}"
            )
        seen = sum(flip < after for flip in flips.values())
        t.note = f"it does in {seen} of {len(changed)}, seen in the counted use of neurons"
    with tally(6, f"all of the next {after} losses within {TOLERANCE:g}") as t:
        for name in changed:
            over = [place for place, one in enumerate(apart[name]) if one > TOLERANCE]
            when = f"over from step {first + 1 + over[0]}" if over else ""
            flip = f"step {first + 1 + flips[name]}" if flips[name] < after else "no step"
            t.check(
                not over,
                f"{name}: {max(apart[name]):.1e}, {when}, rounding chose otherwise at {flip}",
            )
        worst = sorted(map(max, apart.values()))
        t.note = f"largest difference {worst[-1]:.1e}, median {worst[len(worst) // 2]:.1e}"


def first_flip(
    expected: Sequence[Mapping[str, float]], actual: Sequence[Mapping[str, float]]
) -> int:
    """How many records there are before one whose use of experts or neurons differs."""
    counted = ("router/tokens_per_expert", "mone/load_entropy", "mone/load_max_over_mean")
    for place, (one, two) in enumerate(zip(expected, actual, strict=True)):
        for key, value in one.items():
            if key.startswith(counted) and abs(two[key] - value) > 1e-9:
                return place
    return len(expected)
