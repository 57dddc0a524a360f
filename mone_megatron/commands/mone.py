"""Runs ``mone NAME ...``: one command for all command lines of the package.

A command's module is imported when it is called, so that the list of them costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from mone_megatron.command_line import USAGE_EXIT_CODE, interrupted, print_error
from mone_megatron.commands import completion
from mone_megatron.commands.experiments import train_help
from mone_megatron.display import harmless


class Command(NamedTuple):
    """Describes one command line."""

    # Has a ``main`` that takes the arguments and returns the exit status.
    module: str
    # What it does, for the list.
    does: str


# In the order in which they are used.
COMMANDS = {
    "train": Command("mone_megatron.commands.train", "pretrain a MoNE or its MoE baseline"),
    "plan": Command("mone_megatron.commands.plan", "memory, time and cost before a run"),
    "preprocess": Command("mone_megatron.commands.preprocess_data", "text to training data"),
    "compare": Command("mone_megatron.commands.compare_runs", "runs beside each other, on a page"),
    "study": Command("mone_megatron.commands.study", "variants over seeds, with intervals"),
    "export": Command("mone_megatron.commands.export_hf", "a checkpoint to Hugging Face"),
    "import": Command("mone_megatron.commands.import_hf", "a Hugging Face model to a checkpoint"),
    "eval": Command("mone_megatron.commands.eval_hf", "tasks and perplexities of models"),
    "serve": Command("mone_megatron.commands.serve", "an OpenAI server of a model, with vLLM"),
    "generate": Command("mone_megatron.commands.generate", "continue a prompt"),
    "analyze": Command("mone_megatron.commands.analyze_run", "which experts and neurons are used"),
    "sparsify": Command("mone_megatron.commands.sparsify_hf", "prune neurons of trained models"),
    "scaling-law": Command("mone_megatron.commands.scaling_law", "fit scaling laws to runs"),
    "bench": Command("mone_megatron.commands.bench", "what things cost, as ratios"),
    "gpu-check": Command("mone_megatron.commands.gpu_check", "what to ask a first GPU, in minutes"),
}

_HELP = (["-h"], ["--help"])
_COMPLETION = """\
usage: mone completion bash|zsh|fish

Prints what the shell evaluates, in its start-up file: eval "$(mone completion bash)";
fish: mone completion fish | source"""


def usage() -> str:
    """Returns the list of commands as text."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: mone COMMAND ...        (mone COMMAND --help)",
            "",
            *(f"  {name:<{width}}  {command.does}" for name, command in COMMANDS.items()),
            f"  {'completion':<{width}}  prints the completions of a shell: "
            'eval "$(mone completion bash)"',
        ]
    )


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names and returns its exit status."""
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        # Most likely in an import, before the command itself could say so.
        return interrupted("interrupted")


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = given
    if name == "completion":
        if rest in _HELP:
            print(_COMPLETION)
            return 0
        return completion.main(rest)
    if name == completion.ASK:
        print("\n".join(completion.candidates(rest, COMMANDS)))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        print_error(f"{name}: no such command; {hint}")
        return USAGE_EXIT_CODE
    if name == "train" and rest in ([], *_HELP):
        print("\n".join(train_help()))
        return 0
    # argparse shows it in usage lines; Hydra, which reads the arguments there, as well.
    sys.argv = [f"mone {name}", *rest]
    status: int = importlib.import_module(COMMANDS[name].module).main(rest)
    return status
