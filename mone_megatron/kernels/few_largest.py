"""Says of how few numbers a row the largest are found by comparing each with those found so far.

Nothing here needs torch: what plans memory reads it, too.
"""

from __future__ import annotations

# For more of them sorting is the better way (MOST_LARGEST in compiled_cpu.c).
MOST_LARGEST = 16
