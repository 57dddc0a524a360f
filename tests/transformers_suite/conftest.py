"""Runs transformers' common tests on our class, and on the stock one where ours fails or skips."""

from __future__ import annotations

import unittest
from collections.abc import Generator
from pathlib import Path

import pytest

MARKER = "transformers_suite"
_NATIVE = ("weights are saved as the module has them: nothing to convert", "No conversion found")
_FP32 = ("the router computes in fp32 whatever its weight's dtype is", "_keep_in_fp32_modules")
# Beginning of the names of tests that ours does not pass though its parent does -> why, and what
# they say then.
DIFFERENT = {
    # Three of them: fp16, fp32, bf16.
    "test_eager_matches_batched_and_grouped_inference": (
        "eager experts keep all neurons and are refused on purpose",
        'experts_implementation "eager" does not select',
    ),
    "test_reverse_loading_mapping": _NATIVE,
    "test_can_load_from_already_mapped_keys": _NATIVE,
    "test_keep_in_fp32_modules": _FP32,
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Fetches nothing unless the suite is asked for."""
    asked = config.option.markexpr == MARKER
    return None if asked or collection_path.name != "test_common.py" else True


def outcome_of(case: type[unittest.TestCase], name: str) -> tuple[str, str]:
    """Returns ``passed``, ``failed`` or ``skipped`` of one test, and the last line of why."""
    result = unittest.TestResult()
    case(name).run(result)
    told = [text for _, text in (*result.errors, *result.failures)]
    if told:
        return "failed", told[0].strip().splitlines()[-1]
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return "passed", ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that ours does not pass counts as one that it cannot where its parent does not.

    Failures of both, and known differences, are expected failures with the reason; a test that
    ours skips and its parent passes is a failure.
    """
    report = yield
    parent = getattr(getattr(item, "cls", None), "parent_case", None)
    if parent is None or report.when != "call" or report.passed:
        return report
    for name, (why, said) in DIFFERENT.items():
        if item.name.startswith(name) and said in str(report.longrepr):
            report.outcome, report.wasxfail = "skipped", why
            return report
    outcome, reason = outcome_of(parent, item.name)
    if report.failed and outcome != "passed":
        report.outcome = "skipped"
        report.wasxfail = f"{parent.__name__} {outcome}, too: {reason}"
    elif report.skipped and outcome != "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, but {parent.__name__} {outcome}: {report.longrepr}"
    return report
