"""Garbage is looked for as before once what is large has been imported."""

from __future__ import annotations

import gc
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
