"""Checks tasks run while training against the layout and the packages that they need."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources, is_installed
from mone_megatron.config.schema import Config


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields what keeps ``train.eval_tasks`` from running."""
    if not config.train.eval_tasks:
        return
    if config.parallel.context > 1:
        yield (
            f"train.eval_tasks: not with parallel.context={config.parallel.context}, which splits "
            "sequences; use tools/eval_hf.py on a checkpoint"
        )
    for package in ("lm_eval", "transformers"):
        if not is_installed(package):
            yield (
                f"train.eval_tasks: needs {package}, which is not installed; "
                "pip install -e '.[hf]', or train.eval_tasks=[]"
            )
