"""Shares one network device among all gloo groups of a process.

torch gives every gloo group a device of its own, with a thread that wakes a hundred times a second
for as long as anything refers to the group. megatron-core makes ten to thirty groups a process:
their threads take per cents of a core from a run, and where groups outlive their run (a sweep, the
tests) soon all of it. A device can serve any number of groups, so all take the first one's.

``tests/parallel/test_gloo.py`` fails when torch no longer needs it.
"""

from __future__ import annotations

import datetime
import os
from typing import Any, ClassVar

import torch.distributed.distributed_c10d as c10d

_Gloo: Any = c10d.ProcessGroupGloo


class SharedDeviceGloo(_Gloo):
    """Is a gloo process group on the device of this process's first one, which torch chose."""

    # By process: a forked one has no thread for its parent's, which must not be closed there.
    _devices: ClassVar[dict[int, list[Any]]] = {}

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        """Makes the group with torch's own arguments, on the shared device."""
        devices = self._devices.get(os.getpid())
        if devices is None:
            super().__init__(store, rank, size, timeout=timeout)
            self._devices[os.getpid()] = list(self.options._devices)
            return
        options = _Gloo._Options()
        options._timeout = timeout
        options._devices = devices
        # As torch has it: two workers a device.
        options._threads = 2 * len(devices)
        super().__init__(store, rank, size, options)


def share_gloo_devices() -> None:
    """Lets groups that are made from now on share their devices. It may be called again."""
    c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]
