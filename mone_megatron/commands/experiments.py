"""Lists the experiments that are shipped, for those who ask what there is to train."""

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


def experiment_lines() -> list[str]:
    """Returns what ``mone train`` says when it is not told what to train."""
    found = experiments()
    width = max(map(len, found), default=0)
    return [
        "usage: mone train experiment=NAME [key=value ...] [--processes N] [--dry-run]",
        "",
        *(f"  {name:<{width}}  {sentence}" for name, sentence in found.items()),
        "",
        "to begin with, on any machine: mone train experiment=tiny_mone",
    ]
