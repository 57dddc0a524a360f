"""Converts a Hugging Face model to a checkpoint that any layout starts from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mone_megatron.command_line import Parser, exit_status, say, seed
from mone_megatron.display import harmless
from mone_megatron.large_imports import first_import_of
from mone_megatron.ownership import owned_path

if TYPE_CHECKING:
    import torch

_DESCRIPTION = """\
Convert a model of the Hugging Face Hub (a local folder with safetensors) to a checkpoint, to go on
training it as MoE or as MoNE: Qwen3-MoE, Qwen2-MoE, Mixtral, OLMoE, DeepSeek-V2, exports of ours,
and dense Llama, Mistral, Qwen2 and Qwen3 models, which --upcycle-experts makes into MoE.

What our model cannot compute is refused by the key of the configuration, a tensor that is missing
or left over by its name. It ends by comparing the logits of both models, in fp32 on real text."""

_EPILOG = """\
exit status: 0 written and checked, 2 refused

examples:
  python tools/import_hf.py models/OLMoE-1B-7B --output imported/olmoe
  python tools/import_hf.py models/Qwen3-1.7B --output imported/moe --upcycle-experts 8

then, as MoNE that keeps a quarter of the neurons after 10,000 steps:
  torchrun ... -m mone_megatron.pretrain MODEL_KEYS mone=quarter \\
      mone.keep_ratio_schedule=cosine mone.keep_ratio_steps=10000 \\
      checkpoint.initialize=imported/olmoe/checkpoints/step_00000000
where MODEL_KEYS is what this prints."""

_DTYPES = ("saved", "fp32", "bf16")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="MODEL", help="folder of a Hugging Face model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--dtype", default="saved", help="fp32 or bf16; default: as stored, by tensor"
    )
    parser.add_argument(
        "--upcycle-experts",
        type=int,
        metavar="N",
        help="make a dense model one of N experts, each a copy of its MLP",
    )
    parser.add_argument(
        "--upcycle-experts-per-token",
        type=int,
        metavar="K",
        help="experts a token visits in it (default: 2)",
    )
    parser.add_argument("--seed", type=seed, default=1234, help="for the routers of such a model")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the two models at the end (it holds both in memory, in fp32)",
    )
    return parser


def _import(options: argparse.Namespace) -> None:
    if options.dtype not in _DTYPES:
        raise ValueError(f"--dtype: {options.dtype!r} is not one of {', '.join(_DTYPES)}")
    if options.upcycle_experts is None and options.upcycle_experts_per_token is not None:
        raise ValueError("--upcycle-experts-per-token: needs --upcycle-experts")
    if not (options.source / "config.json").is_file():
        raise ValueError(
            f"{options.source}: holds no config.json; give the folder of a downloaded model"
        )
    from mone_megatron.extras import calm_bars, require

    require("hf", "transformers", "safetensors")
    calm_bars()
    # Only now: transformers takes seconds to import.
    with first_import_of("torch"):
        import torch

        from mone_megatron.hf import importing, text_format
        from mone_megatron.hf.weights import open_weights

    dtype = {"saved": None, "fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    upcycling = None
    if options.upcycle_experts is not None:
        per_token = options.upcycle_experts_per_token or 2
        upcycling = importing.Upcycling(options.upcycle_experts, per_token)
    with open_weights(options.source) as weights:
        planned = importing.plan_import(options.source, weights, upcycling=upcycling)
        say(f"{options.source}: {planned.settings.architecture.class_name}")
        stored = planned.describe_dtypes(weights)
        say(text_format.describe(planned.framing, options.source))
        say(f"stored in {stored}; {'kept so' if dtype is None else f'converted to {dtype}'}")
        checkpoint = importing.run_import(
            planned,
            weights,
            options.output,
            dtype=dtype,
            seed=options.seed,
            name=options.source.name,
            progress=say,
            check=lambda folder: _check(
                options, folder, dtype=dtype, made_experts=upcycling is not None
            ),
        )
    print(f"wrote {checkpoint}")
    keys = importing.model_overrides(planned.model, planned.settings.mone)
    print(f"model keys: {' '.join(keys)}")


def _check(
    options: argparse.Namespace, folder: Path, *, dtype: torch.dtype | None, made_experts: bool
) -> None:
    from mone_megatron.hf import checks

    if options.no_check:
        return
    say("comparing both models on real text")
    found = checks.check_import(folder, options.source, choices=not made_experts, dtype=dtype)
    if not found.holds:
        raise ValueError(f"{options.output}: not written: {found.describe()}")
    print(f"checked: {found.describe()}")


def _owning(options: argparse.Namespace) -> None:
    with owned_path("--output", options.output):
        _import(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
