"""Fixtures of tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mone_megatron.kernels import compiled_cpu


@pytest.fixture(scope="module", params=["compiled", "torch"])
def cpu_functions(request: pytest.FixtureRequest) -> Iterator[str]:
    """What computes on CPU: functions compiled here, or torch as where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(compiled_cpu, "_COMPILERS", ())
        compiled_cpu.compiled.cache_clear()
        found = compiled_cpu.compiled()
        if request.param == "compiled" and found.library is None:
            pytest.skip(found.problem)
        assert (found.library is None) == (request.param == "torch")
        yield request.param
    compiled_cpu.compiled.cache_clear()
