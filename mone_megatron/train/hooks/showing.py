"""Hooks that only show a run cannot stop it: what keeps them from it is told, in run.json too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mone_megatron.methods.hook import Hook, Record

# Is told what is not shown, and why.
Note = Callable[[str, str], None]


class ShowingHook(Hook):
    """Passes on to a hook that only shows, whose first error ends it and not the run."""

    def __init__(self, hook: Hook, what: str, note: Note) -> None:
        """Passes everything on to ``hook``.

        Args:
            hook: one that writes nothing a run or a tool reads again.
            what: it shows, for the record.
            note: is told of its error, once.
        """
        self._hook = hook
        self._what = what
        self._note = note
        self._ended = False

    def on_start(self) -> None:
        """Passes on."""
        with self._harmless():
            self._hook.on_start()

    def on_start_record(self, record: Record) -> None:
        """Passes on."""
        with self._harmless():
            if not self._ended:
                self._hook.on_start_record(record)

    def on_step(self, record: Record) -> None:
        """Passes on."""
        with self._harmless():
            if not self._ended:
                self._hook.on_step(record)

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Passes on."""
        with self._harmless():
            if not self._ended:
                self._hook.on_fault(step, fault, action)

    def on_rollback(self, step: int) -> None:
        """Passes on."""
        with self._harmless():
            if not self._ended:
                self._hook.on_rollback(step)

    def on_end(self, status: str) -> None:
        """Passes on, also after an error: what it opened is to be closed."""
        with self._harmless():
            self._hook.on_end(status)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        # Whatever it is, drawing and printing are not worth a run.
        except Exception as error:
            if self._ended:
                return
            self._ended = True
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"WARNING: {self._what} is not shown ({why}); training goes on",
                file=sys.stderr,
                flush=True,
            )
            self._note(self._what, why)
