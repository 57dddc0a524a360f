"""A training run whose watchdog fails after some looks: ``failing_watchdog.py [OVERRIDE ...]``."""

from __future__ import annotations

import sys
from typing import Any

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend

LOOKS = 5


def main() -> int:
    # Before megatron-core is imported; see mone_megatron.pretrain.
    install_cpu_backend()
    from mone_megatron.pretrain import main as pretrain
    from mone_megatron.train.health.watchdog import Watchdog

    signature, looks = Watchdog._signature, 0

    def failing(self: Watchdog) -> Any:
        nonlocal looks
        looks += 1
        if looks > LOOKS:
            raise MemoryError("no memory for a look")
        return signature(self)

    Watchdog._signature = failing  # type: ignore[method-assign]
    return pretrain(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
