"""Rows 3 to 5: a damaged tracker or checkpoint of a real run on two ranks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from faults_helpers import (
    SMALL,
    end,
    launch,
    losses,
    saved_steps,
    state_digest,
    step_folder,
    steps,
)
from faults_table import Tally

from mone_megatron.checkpoint import (
    CheckpointStore,
    DamagedCheckpointError,
    NoUsableCheckpointError,
    open_checkpoint,
)
from mone_megatron.megatron_release import megatron_release
from mone_megatron.parallel.megatron_compat.checkpoint_forms import COMMON
from mone_megatron.testing.launch import run_layouts

Count = Callable[[int, str], AbstractContextManager[Tally]]

LAST = 12
# A file without tensors. megatron-core 0.19 keeps what is no tensor in the shards, too.
NO_TENSORS = COMMON if megatron_release() < (0, 17, 0) else ".metadata"
RUN = (
    *SMALL,
    "model.hidden_dropout=0.1",
    "parallel.expert=2",
    f"train.steps={LAST}",
    "checkpoint.interval=3",
    "checkpoint.keep_last=100",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end, with checkpoints of steps 3, 6, 9 and 12. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    run_layouts({"run": RUN}, processes=2, folder=folder)
    assert saved_steps(folder / "run") == [3, 6, 9, 12]
    return folder / "run"


# Row 3


def change_tracker(**values: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}) + "\n")

    return change


TRACKERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(random.Random(3).randbytes(120)),
    "pointing nowhere": change_tracker(step=700, folder="step_00000700"),
    "zeros": lambda path: path.write_bytes(bytes(120)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "not an object": lambda path: path.write_text("null"),
    "nested deeply": lambda path: path.write_text("[" * 5000),
    "fields missing": lambda path: path.write_text('{"step": 12}'),
    "outside the folder": change_tracker(folder="../elsewhere"),
    "a step that is text": change_tracker(step="12"),
    "another manifest": change_tracker(manifest_sha256="0" * 64),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
}


def test_trackers_of_a_store(whole: Path, tally: Count, tmp_path: Path) -> None:
    with tally(3, "tracker damaged, sound checkpoints there: the newest is found") as t:
        for name, damage in TRACKERS.items():
            folder = tmp_path / name
            shutil.copytree(whole / "checkpoints", folder)
            damage(folder / "latest.json")
            said: list[str] = []
            found = CheckpointStore(folder, log=said.append).newest_verified()
            told = any("WARNING" in line and "latest.json" in line for line in said)
            t.check(
                found is not None and found.step == LAST and told,
                f"{name}: {found and found.step}, {said}",
            )
            shutil.rmtree(folder)
    with tally(3, "tracker damaged, the newest checkpoint too: the one before is found") as t:
        for name, damage in TRACKERS.items():
            folder = tmp_path / name
            shutil.copytree(whole / "checkpoints", folder)
            damage(folder / "latest.json")
            (folder / f"step_{LAST:08d}" / NO_TENSORS).write_bytes(b"")
            said = []
            found = CheckpointStore(folder, log=said.append).newest_verified()
            t.check(found is not None and found.step == LAST - 3, f"{name}: {found and found.step}")
            shutil.rmtree(folder)
    with tally(3, "a tracker and no sound checkpoint: an error that says so") as t:
        for name, damage in TRACKERS.items():
            if name == "missing":  # then it is a run that has not saved yet
                continue
            folder = tmp_path / name
            folder.mkdir()
            shutil.copy(whole / "checkpoints" / "latest.json", folder)
            damage(folder / "latest.json")
            try:
                CheckpointStore(folder, log=lambda _: None).newest_verified()
            except NoUsableCheckpointError as error:
                t.check(str(folder) in str(error), f"{name}: {error}")
            else:
                t.check(False, f"{name}: it starts afresh")
            shutil.rmtree(folder)


def test_a_lost_checkpoint_ends_the_start(full: bool, tally: Count, tmp_path: Path) -> None:
    if not full:
        pytest.skip("in the full version only: a start of its own")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "latest.json").write_text('{"step": 3, "folder": "step_00000003"}')
    codes, said = end(launch(folder.parent, *SMALL, "checkpoint.resume=auto"))
    with tally(3, "a tracker and no sound checkpoint: a start ends with 2 and says so") as t:
        told = [line for line in said.splitlines() if line.startswith("error: no checkpoint in")]
        t.check(codes == [2] and len(told) == 1 and not steps(folder.parent), f"{codes}: {said}")


# Row 4


def flips(tally: Tally, folder: Path, count: int) -> None:
    """Flip one bit at a time, in each file in turn, and back."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    choose = random.Random(4)
    for number in range(count):
        path = files[number % len(files)]
        place, bit = choose.randrange(path.stat().st_size), 1 << choose.randrange(8)

        def flip(path: Path = path, place: int = place, bit: int = bit) -> None:
            with path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ bit]))

        flip()
        name = path.relative_to(folder).as_posix()
        tally.check(refused(folder, name), f"{name}, byte {place}, bit {bit}")
        flip()
    tally.note = f"{len(files)} files of 2 ranks"


def refused(folder: Path, name: str) -> bool:
    """Whether a checkpoint is refused for one file."""
    try:
        open_checkpoint(folder)
    except DamagedCheckpointError as error:
        return any(problem.startswith(f"{name}: ") for problem in error.problems)
    return False


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero_block(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


FIRST, SECOND = "__0_0.distcp", "__1_0.distcp"
# What is done to checkpoint c, with o another of the same run, and the file to be named.
STRUCTURAL: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a rank's file removed": (SECOND, lambda c, o: (c / SECOND).unlink()),
    ".metadata removed": (".metadata", lambda c, o: (c / ".metadata").unlink()),
    "the last byte cut off": (FIRST, lambda c, o: cut(c / FIRST)),
    "emptied": (NO_TENSORS, lambda c, o: (c / NO_TENSORS).write_bytes(b"")),
    "a block of zeros": (FIRST, lambda c, o: zero_block(c / FIRST)),
    "a file of another step": (SECOND, lambda c, o: shutil.copy(o / SECOND, c / SECOND)),
    "two ranks' files swapped": (FIRST, lambda c, o: swap(c / FIRST, c / SECOND)),
    "a file more": ("__2_0.distcp", lambda c, o: shutil.copy(c / FIRST, c / "__2_0.distcp")),
    "a link instead of a file": (FIRST, lambda c, o: link(c / FIRST, o / FIRST)),
    "manifest removed": ("manifest.json", lambda c, o: (c / "manifest.json").unlink()),
    "manifest of another step": (
        "manifest.json",
        lambda c, o: shutil.copy(o / "manifest.json", c / "manifest.json"),
    ),
}
if NO_TENSORS == COMMON:
    STRUCTURAL["common.pt of another step"] = (
        COMMON,
        lambda c, o: shutil.copy(o / COMMON, c / COMMON),
    )


def test_flipped_bits_and_structural_damage(
    whole: Path, full: bool, tally: Count, tmp_path: Path
) -> None:
    folder = tmp_path / f"step_{LAST:08d}"
    shutil.copytree(step_folder(whole, LAST), folder)
    assert {FIRST, SECOND, ".metadata", NO_TENSORS} <= {path.name for path in folder.iterdir()}
    with tally(4, "one bit flipped: refused, the file named") as t:
        flips(t, folder, 200 if full else 40)
    open_checkpoint(folder)
    with tally(4, "structure damaged: refused, the file named") as t:
        for name, (file, damage) in STRUCTURAL.items():
            shutil.rmtree(folder)
            shutil.copytree(step_folder(whole, LAST), folder)
            damage(folder, step_folder(whole, LAST - 3))
            t.check(refused(folder, file), name)


# Rows 3 and 5, to the end of the run


def flip_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


NEWEST: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights flipped": (FIRST, lambda c: flip_in_the_middle(c / FIRST)),
    "metadata flipped": (".metadata", lambda c: flip_in_the_middle(c / ".metadata")),
    "cut": (SECOND, lambda c: cut(c / SECOND)),
    "emptied": (NO_TENSORS, lambda c: (c / NO_TENSORS).write_bytes(b"")),
    "rank missing": (SECOND, lambda c: (c / SECOND).unlink()),
    "manifest missing": ("manifest.json", lambda c: (c / "manifest.json").unlink()),
    "manifest flipped": ("manifest.json", lambda c: flip_in_the_middle(c / "manifest.json")),
}


def test_a_run_goes_on_bitwise_from_what_is_sound(
    whole: Path, full: bool, tally: Count, tmp_path: Path
) -> None:
    trackers = list(TRACKERS)[: 4 if full else 1]
    newest = list(NEWEST)[: len(NEWEST) if full else 1]
    for name in trackers:
        shutil.copytree(whole, tmp_path / name)
        # As if the run had been killed after step 9, so that there is something to do.
        shutil.rmtree(step_folder(tmp_path / name, LAST))
        TRACKERS[name](tmp_path / name / "checkpoints" / "latest.json")
    for name in newest:
        shutil.copytree(whole, tmp_path / name)
        NEWEST[name][1](step_folder(tmp_path / name, LAST))
    jobs = {name: (*RUN, "checkpoint.resume=auto") for name in (*trackers, *newest)}
    run_layouts(jobs, processes=2, folder=tmp_path)
    said = (tmp_path / "rank-2-0.log").read_text(encoding="utf-8").splitlines()

    def wrong(name: str, warning: str) -> str:
        """What is not as it should be; nothing, if all is."""
        run = tmp_path / name
        lines = [line for line in said if f"/{name}/" in line]
        if not any(line.startswith(f"resumed from {step_folder(run, 9)} ") for line in lines):
            return f"{name}: not resumed from step 9: {lines}"
        if not any(line.startswith("WARNING: ") and warning in line for line in lines):
            return f"{name}: no warning of {warning}: {lines}"
        if losses(run) != losses(whole):
            return f"{name}: losses differ"
        if state_digest(step_folder(run, LAST)) != state_digest(step_folder(whole, LAST)):
            return f"{name}: weights or moments differ"
        return ""

    with tally(3, "tracker damaged: a run on 2 ranks goes on bitwise, with a warning") as t:
        for name in trackers:
            t.check(not (problem := wrong(name, "latest.json")), problem)
    with tally(5, "newest checkpoint corrupt: the one before, a warning, bitwise from there") as t:
        for name in newest:
            t.check(not (problem := wrong(name, f"is damaged: {NEWEST[name][0]}: ")), problem)
