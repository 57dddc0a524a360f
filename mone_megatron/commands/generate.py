"""Continues a prompt with a run of ours, an export, or any transformers model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say, seed
from mone_megatron.data.lines import (
    BYTE_ORDER_MARK,
    NotUTF8Error,
    check_characters,
    decode,
    read_lines,
)
from mone_megatron.display import harmless, is_read
from mone_megatron.large_imports import first_import_of

_DESCRIPTION = """\
Prompt in, text streamed out. The model is a run (its newest checkpoint, converted in memory), a
checkpoint, an export, or any folder in the format of transformers. The prompt is --prompt, the
lines of a file, or standard input. Speed goes to standard error: the prompt and the tokens after it
apart."""

_EPILOG = """\
exit status: 0 done, 2 for what cannot be done

examples:
  python tools/generate.py runs/quickstart/mone --prompt "import os"
  python tools/generate.py exports/mone --prompts prompts.txt --temperature 0.8 --top-p 0.95
  echo "def main(" | python tools/generate.py exports/mone --max-new-tokens 100"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint, export or model folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line, all of them in one batch"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (the default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 for no limit")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="for sampling")
    parser.add_argument("--dtype", choices=("saved", "fp32", "bf16"), default="saved")
    parser.add_argument("--device", default="cpu", help="as torch names it (cpu)")
    parser.add_argument(
        "--experts",
        choices=("auto", "mone_sparse", "mone", "mone_batched_mm", "grouped_mm", "batched_mm"),
        default="auto",
        help="how experts are computed (auto: mone_sparse, which reads the rows of kept neurons "
        "only, where the model selects; grouped_mm and batched_mm compute all neurons)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that lies beside the weights"
    )
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        try:
            check_characters(options.prompt)
        except ValueError:
            # Python stands in such halves for bytes of an argument that are not UTF-8.
            raise ValueError("--prompt: is not UTF-8") from None
        return [options.prompt]
    if options.prompts is None:
        return [_standard_input().rstrip("\n")]
    try:
        lines = read_lines(options.prompts)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--prompts: {options.prompts} cannot be read ({reason})") from None
    except ValueError as error:
        raise ValueError(f"--prompts: {error}") from None
    if not lines:
        raise ValueError(f"--prompts: {options.prompts} holds no prompt")
    return lines


def _standard_input() -> str:
    content = sys.stdin.buffer.read()
    try:
        return decode(content.removeprefix(BYTE_ORDER_MARK))
    except NotUTF8Error as error:
        line = content.count(b"\n", 0, error.position) + 1
        raise ValueError(f"standard input:{line}: {error}") from None


def _show(text: str) -> None:
    print(text, end="", flush=True)
    if not is_read("stdout"):
        # Nobody waits for the rest of the text.
        raise SystemExit(0)


def _generate(options: argparse.Namespace) -> None:
    prompts = _prompts(options)
    from mone_megatron.extras import calm_bars, require

    require("hf", "transformers", "safetensors")
    calm_bars()
    # Only now: transformers takes seconds to import.
    with first_import_of("torch"):
        import torch

        from mone_megatron.evaluation.models import choose_device
        from mone_megatron.hf.generation import Sampling, choose_experts, generate
        from mone_megatron.hf.loading import load_model

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    device = choose_device(options.device)
    loaded = load_model(
        options.model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}.get(options.dtype),
        device=device,
        trust_remote_code=options.trust_remote_code,
        say=say,
    )
    if loaded.tokenizer is None or loaded.framing is None:
        raise ValueError(f"{options.model}: holds no tokenizer")
    experts = choose_experts(loaded.model, options.experts)
    say(f"{loaded.source}: {type(loaded.model).__name__}, experts: {experts}")
    say(loaded.framing.describe(loaded.tokenizer.backend_tokenizer))
    if len(prompts) == 1:
        _show(prompts[0])
        outcome = generate(loaded.model, loaded.tokenizer, prompts, sampling, show=_show)
        print()
    else:
        outcome = generate(loaded.model, loaded.tokenizer, prompts, sampling)
        for number, (prompt, text) in enumerate(zip(prompts, outcome.texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")
    say(outcome.describe())


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_generate, options)
