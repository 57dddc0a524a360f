"""Keeps a forked child from destroying objects of its parent.

A child has its parent's objects, but none of its threads. What owns threads, such as a process
group, waits for them when it is destroyed, and in a child waits for ever or ends in a SIGSEGV. So
what was the parent's at the fork is never collected in the child, garbage or not. Modules that fork
import this one.
"""

from __future__ import annotations

import gc
import os

os.register_at_fork(after_in_child=gc.freeze)
