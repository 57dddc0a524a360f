"""What the tests of evaluation share beside fixtures."""

from __future__ import annotations

import argparse
from pathlib import Path

# A text that is on every machine.
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
# Tokens that the models are made for.
MAX_LENGTH = 96
