"""Adds options that several benchmarks have, and reads their values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mone_megatron.config.schema import Config
    from mone_megatron.lab.benchmarks.layer import LayerShape


def positive(text: str) -> int:
    """Reads a whole number from 1 on.

    Raises:
        ArgumentTypeError: for what is none.
    """
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Reads a whole number from 0 on.

    Raises:
        ArgumentTypeError: for what is none.
    """
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more")
    return number


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds Hydra overrides, after the options."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Adds what training steps on several ranks need: ``--processes`` and overrides."""
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        help="gloo ranks on this machine (default 1); on GPUs those that torchrun started",
    )
    add_overrides(parser)


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Adds the two experiments that are compared, ``--moe`` and ``--mone``."""
    parser.add_argument("--moe", default="quickstart_moe", help="default quickstart_moe")
    parser.add_argument("--mone", default="quickstart_mone", help="default quickstart_mone")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds where single operations run, and in what: ``--device``, ``--dtype``, ``--threads``."""
    add_device(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument(
        "--threads", type=not_negative, default=1, help="of torch; 0 for one a core (default 1)"
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of one MoE layer."""
    parser.add_argument("--hidden", type=positive, default=1024, help="h (default 1024)")
    parser.add_argument("--neurons", type=positive, default=512, help="f (default 512)")
    parser.add_argument("--experts", type=positive, default=16, help="default 16")
    parser.add_argument("--chosen", type=positive, default=4, help="of a token (default 4)")


def prepared(options: argparse.Namespace, experiment: str, *first: str) -> Config:
    """Returns an experiment's configuration with the options of :func:`add_steps`, checked.

    Args:
        options: the command line's.
        experiment: an option of ``conf/experiment``.
        first: overrides that those of the command line may change again.

    Raises:
        ConfigError: it cannot work.
    """
    from mone_megatron.lab.benchmarks import ranks

    return ranks.prepare(
        [f"experiment={experiment}", *first, *options.overrides],
        options.processes,
        device=options.device,
    )


def shape_of(options: argparse.Namespace, tokens: int) -> LayerShape:
    """Returns the sizes that :func:`add_sizes` names, for so many tokens."""
    from mone_megatron.lab.benchmarks.layer import LayerShape

    return LayerShape(options.hidden, options.neurons, options.experts, options.chosen, tokens)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    """Returns what ``--dtype`` names."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
