"""Says whether what a module does may be done without calling it, as some kernels do."""

from __future__ import annotations

from torch import nn


def calls_only(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Returns whether there is a module whose call does what ``kind.forward`` does, and no more.

    A hook may want to see what it is given or gives, and a subclass or a wrapper may have put a
    forward of its own in the place of that.
    """
    if not isinstance(module, kind):
        return False
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return not any(hooks) and getattr(module.forward, "__func__", None) is kind.forward
