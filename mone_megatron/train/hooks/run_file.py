"""``run.json``: what ran, on what, how far it came and how it ended."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from mone_megatron.config.schema import Config
from mone_megatron.display import lost
from mone_megatron.methods.hook import Hook, Record
from mone_megatron.planning.budget import usage_is_fixed
from mone_megatron.report.runs import load_run
from mone_megatron.report.usage import measured
from mone_megatron.whole_files import write_json


class RunFileHook(Hook):
    """Writes ``run.json``: what ran, on what, and how it ended."""

    def __init__(self, folder: Path, facts: dict[str, Any], config: Config) -> None:
        """Starts from ``facts``: what is known before the first step, and how far a resumed run is
        (``steps``, ``tokens``, ``seconds``)."""
        self.path = folder / "run.json"
        self.config = config
        self.facts = facts | {"status": "running"}
        self.missed: set[str] = set()

    def on_start(self) -> None:
        """Writes what is known."""
        write_json(self.path, self.facts)

    def on_step(self, record: Record) -> None:
        """Remembers how far it came."""
        self.facts["steps"] = int(record["step"])
        self.facts["tokens"] = int(record["tokens"])
        self.facts["seconds"] += record["step_seconds"]
        self._note_streams()

    def note(self, what: str, why: str) -> None:
        """Adds to ``not_shown``, on disk at once: what the run could not show, and why.

        Each is noted the first time only. A note that cannot be written is let go.
        """
        if what in self.missed:
            return
        self.missed.add(what)
        missed = self.facts.setdefault("not_shown", [])
        missed.append({"what": what, "why": why, "step": self.facts["steps"]})
        with suppress(OSError):
            write_json(self.path, self.facts)

    def _note_streams(self) -> None:
        for stream, why in lost().items():
            self.note(stream, why)

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Counts and names it."""
        self.facts.setdefault("faults", []).append({"step": step, "why": fault, "action": action})

    def on_end(self, status: str) -> None:
        """Writes how it ended, and what its tokens used where its method leaves that open."""
        self.facts["status"] = status
        self._note_streams()
        write_json(self.path, self.facts)
        if usage_is_fixed(self.config):
            return
        # A run that recorded nothing of it (logging.layer_interval=0) has its planned counts alone.
        with suppress(ValueError):
            run = load_run(self.path.parent)
            self.facts["measured"] = measured(self.config, self.facts["vocab_size"], run)
            write_json(self.path, self.facts)
