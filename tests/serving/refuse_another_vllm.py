"""Asks for configurations as if this vLLM were not supported: refuse_another_vllm.py OURS STOCK."""

from __future__ import annotations

import sys


def main() -> None:
    """Prints what loading each of two models' configurations ends with."""
    import mone_vllm
    from mone_vllm import versions
    from transformers import AutoConfig

    versions.SUPPORTED = ((0, 1), (0, 2))
    mone_vllm.register()
    for folder in sys.argv[1:3]:
        try:
            print(type(AutoConfig.from_pretrained(folder)).__name__)
        except ValueError as error:
            print(error)


if __name__ == "__main__":
    main()
