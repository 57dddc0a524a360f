"""Compiles the kernels that a run can come to need before its first step, and says so."""

from __future__ import annotations

from mone_megatron.mone.warm_up import warm_up
from mone_megatron.train.introduction import say
from mone_megatron.train.session import Session


def compile_kernels(session: Session) -> None:
    """Compiles the kernels of training, of steps that count and of evaluation; nothing on a CPU.

    Tells on rank 0 how long it took there, and what the kernels leave to torch. Collective where
    the neurons of an expert are spread over ranks.
    """
    config = session.config
    done = warm_up(
        session.state.chunks,
        session.device.torch_device,
        looking=config.logging.layer_interval > 0,
        keeping_all=config.mone.enabled and config.mone.keep_ratio_schedule != "constant",
    )
    if done is None:
        return
    say(
        f"compiled {done.variants} variants of kernels before the first step, in "
        f"{done.seconds:.1f} s (those of an earlier run come from Triton's cache)"
    )
    for line in done.left_to_torch:
        say(line)
