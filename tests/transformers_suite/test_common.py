"""transformers' common tests on the exported class: with GQA, with MLA, and with every option."""

from __future__ import annotations

import cases
import pytest

pytestmark = pytest.mark.transformers_suite


class TestGroupedQueryAttention(cases.Ours):
    """The family's defaults."""


class TestEverything(cases.Everything):
    """Every option."""


class TestLatentAttention(cases.Latent):
    """Multi-latent attention."""
