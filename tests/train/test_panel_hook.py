"""The panel's files over resumes and rollbacks, the terminal, and W&B."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.train.health.alerts import Alert
from mone_megatron.train.hooks.panel_files import PanelFilesHook
from mone_megatron.train.hooks.wandb_run import WandbHook
from mone_megatron.train.panel import LayerUse, Panel


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["experiment=tiny_moe", "logging.alerts.patience=2", "train.steps=3"])


def _panel(step: int, dead: Sequence[int]) -> Panel:
    tokens = tuple(0.0 if expert in dead else 128.0 for expert in range(8))
    return Panel(step, (LayerUse("routed", 1, {"tokens": tokens}, None),))


# Expert 3 is dead at steps 2 to 5, expert 6 at 5 and 6: alerts at 3, 6 (begin) and 7 (end of 3's).
PANELS = [
    _panel(step, [*([3] if 2 <= step <= 5 else []), *([6] if step in (5, 6) else [])])
    for step in range(1, 9)
]
EVENTS = [(3, "begin", 3), (6, "begin", 6), (7, "end", 3), (8, "end", 6)]


def _files(folder: Path) -> tuple[str, str]:
    return tuple((folder / name).read_text() for name in ("panel.jsonl", "alerts.jsonl"))  # type: ignore[return-value]


def _hook(config: Config, folder: Path, step: int = 0) -> tuple[PanelFilesHook, list[Alert]]:
    folder.mkdir(exist_ok=True)
    told: list[Alert] = []
    hook = PanelFilesHook(config, folder, step=step, tell=told.extend, stream=io.StringIO())
    hook.on_start()
    return hook, told


@pytest.fixture
def whole(config: Config, tmp_path: Path) -> tuple[str, str]:
    """Of a run that nothing interrupts."""
    hook, told = _hook(config, tmp_path / "whole")
    for panel in PANELS:
        hook.add(panel)
    hook.on_end("completed")
    assert [(one.step, one.event, one.expert) for one in told] == EVENTS
    return _files(tmp_path / "whole")


@pytest.mark.parametrize("back_to", range(8))
@pytest.mark.parametrize("how", ["resume", "rollback"])
def test_files_after_going_back(
    config: Config, tmp_path: Path, whole: tuple[str, str], how: str, back_to: int
) -> None:
    hook, told = _hook(config, tmp_path / "run")
    # What is undone saw other experts die.
    for panel in [*PANELS[:back_to], *(_panel(step, [0]) for step in range(back_to + 1, 12))]:
        hook.add(panel)
    told.clear()
    if how == "rollback":
        hook.on_rollback(back_to)
    else:
        hook.on_end("interrupted")
        with (tmp_path / "run" / "panel.jsonl").open("a") as file:
            file.write('{"step": 12, "lay')  # a kill
        hook, told = _hook(config, tmp_path / "run", step=back_to)
    for panel in PANELS[back_to:]:
        hook.add(panel)
    hook.on_end("completed")
    assert _files(tmp_path / "run") == whole
    # What came before is not told again.
    assert [(one.step, one.event, one.expert) for one in told] == [
        event for event in EVENTS if event[0] > back_to
    ]


def test_the_terminal_is_not_flooded(config: Config, tmp_path: Path) -> None:
    hook, told = _hook(config, tmp_path / "run")
    for step in (1, 2):
        hook.add(_panel(step, range(6)))
    hook.on_end("completed")
    assert isinstance(hook.stream, io.StringIO)
    lines = hook.stream.getvalue().splitlines()
    # Six experts and the router, whose load two experts have to themselves.
    assert len(told) == 7
    assert len(lines) == 5
    assert lines[0] == f"ALERT step 2: {told[0].message}"
    assert lines[-1] == f"ALERT step 2: 3 more: {tmp_path / 'run' / 'alerts.jsonl'}"


def _records(content: bytes) -> Iterator[bytes]:
    """W&B's file: LevelDB's log of blocks of 32 KiB, after 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no room for a header
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_gets_few_messages_with_all_alerts(config: Config, tmp_path: Path) -> None:
    """A real run of W&B's, offline; its file is read back."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    def alert(step: int, event: str, expert: int) -> Alert:
        place = {"kind": "dead_expert", "part": "routed", "layer": 1, "expert": expert}
        numbers = {"value": 0.0, "threshold": 0.05, "message": f"expert {expert}: {event}"}
        return Alert(step=step, event=event, **place, **numbers)  # type: ignore[arg-type]

    hook = WandbHook(config, tmp_path, "abc")
    hook.on_start()
    hook.on_alerts([alert(1, "begin", 0)])
    for step in (1, 2, 3):
        hook.on_step({"step": step, "loss": 1.0})
        hook.on_alerts(
            [alert(step, "begin" if step < 3 else "end", 10 * step + n) for n in range(9)]
        )
    hook.on_end("completed")
    # Its service writes the end of the file when it ends, and would be found by later tests' runs.
    wandb.teardown()
    content = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    records = [wandb_internal_pb2.Record.FromString(data) for data in _records(content)]
    assert records[-1].WhichOneof("record_type") == "exit"
    sent = [one.alert for one in records if one.WhichOneof("record_type") == "alert"]
    # The first at once; what came within a minute of it in the end.
    assert [one.title for one in sent] == [
        "experts and neurons: 1 begun, 0 over",
        "experts and neurons: 18 begun, 9 over",
    ]
    assert [one.level for one in sent] == ["WARN", "WARN"]
    assert sent[0].text == "step 1: expert 0: begin"
    lines = sent[1].text.splitlines()
    assert lines[-1] == "and 7 more: see the run's alerts.jsonl"
    assert lines[19] == "step 3: expert 31: end"
