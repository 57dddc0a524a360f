"""Garbage is looked for as before once what is large has been imported."""

from __future__ import annotations

import contextlib
import gc
import signal
import weakref

import pytest

from mone_megatron.large_imports import first_import_of


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_collections_wait_until_the_import_is_over() -> None:
    try:
        with first_import_of("no_package_of_this_name"):
            assert not gc.isenabled()
            kept = weakref.ref(Node())
        assert gc.isenabled()
        gc.collect()
        # Looked through no more.
        assert kept() is not None
        later = weakref.ref(Node())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
    assert kept() is None


def test_they_go_on_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), first_import_of("no_package_of_this_name"):
        import no_package_of_this_name  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_package_that_is_there_and_a_user_who_collects_nothing_change_nothing() -> None:
    frozen = gc.get_freeze_count()
    with first_import_of("pytest"):
        assert gc.isenabled()
    gc.disable()
    try:
        with first_import_of("no_package_of_this_name"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    # Frozen objects may die meanwhile; what would freeze anew adds the thousands of a process.
    assert gc.get_freeze_count() <= frozen


def interrupted_import(package: str, reached: list[str]) -> None:
    with first_import_of(package):
        # As some packages do while they are imported.
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        reached.append("the end")
        import no_package_of_this_name  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize("package", ["no_package_of_this_name", "pytest"])
def test_ctrl_c_ends_it_also_where_a_package_swallows_it(package: str) -> None:
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_import(package, reached)
    assert reached
    with pytest.raises(KeyboardInterrupt), first_import_of(package):
        signal.raise_signal(signal.SIGINT)
    swallowing = contextlib.suppress(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), first_import_of(package), swallowing:
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_are_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with first_import_of("pytest"):
            signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
