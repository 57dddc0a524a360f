"""Says how to train and lists the experiments that are shipped, for those who ask what there is."""

from __future__ import annotations

from mone_megatron.shipped_files import shipped


def experiments() -> dict[str, str]:
    """Returns the name of each experiment and the sentence that its file begins with."""
    found = {}
    for path in sorted(shipped("conf").glob("experiment/*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = []
        for line in lines:
            if not line.startswith("#"):
                break
            if "@package" not in line:
                comments.append(line.lstrip("# "))
        text = " ".join(comments)
        sentence, dot, _ = text.partition(". ")
        found[path.stem] = sentence + dot.rstrip()
    return found


_OPTIONS = {
    "--processes N": "processes on this machine, each on a GPU of its own where there are some",
    "--dry-run[=N]": "check what the run (of N processes elsewhere) would, and train nothing",
    "-m, --multirun": "a run for each value of key=A,B, and a page that compares them",
    "--cfg job": "print the configuration; --hydra-help: Hydra's other options",
}


def train_help() -> list[str]:
    """Returns what ``mone train`` says when it is not told what to train, or asked for help."""
    found = experiments()
    width = max(map(len, found), default=0)
    wide = max(map(len, _OPTIONS))
    return [
        "usage: mone train experiment=NAME [key=value ...] [--processes N] [--dry-run]",
        "",
        *(f"  {option:<{wide}}  {does}" for option, does in _OPTIONS.items()),
        "",
        "keys: docs/configuration.md; experiments:",
        "",
        *(f"  {name:<{width}}  {sentence}" for name, sentence in found.items()),
        "",
        "to begin with, on any machine: mone train experiment=tiny_mone",
    ]
