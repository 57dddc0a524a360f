"""Runs the fake step and says in a few numbers what it found.

``python -m mone_megatron.lab.gpu_check.fake_step FILE RANK WORLD key=value ...`` writes everything
to FILE, and prints JSON as its last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mone_megatron.command_line import Parser
from mone_megatron.testing.fake_cuda.findings import WAIT, Finding
from mone_megatron.testing.fake_cuda.guard import why_not

# Of the loss with all that is summed beside it, of the gradient norm, and of the end of a step.
_MOST_OUTSIDE = 3


def summary(written: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns what was found, in words and numbers, and whether it is what it has to be.

    Args:
        written: what :mod:`mone_megatron.testing.fake_cuda.step` writes as JSON.
    """
    faults = [
        f"{line['what']} ({line['place']})"
        for lines in written["found"].values()
        for line in lines
        if line["kind"] == "fault"
    ]
    ours = theirs = outside = 0
    for line in written["found"].get("step", []):
        finding = Finding(**{key: line[key] for key in ("kind", "what", "place", "ours")})
        if finding.kind != WAIT:
            continue
        if not finding.in_layer:
            outside += line["count"]
        elif finding.by_us:
            ours += line["count"]
        else:
            theirs += line["count"]
    later = written["compiled_later"]
    found: dict[str, Any] = {
        "operations that a GPU would refuse": len(faults),
        "waits of ours in layers": ours,
        "of megatron-core in layers": f"{theirs} in {written['moe_layers']} layers with experts, "
        f"{written['microbatches']} microbatches",
        "outside of layers": outside,
        "variants of kernels before the first step": written["compiled_before"],
        "and after it": len(later),
        "process groups": written["groups"],
        "Adam": ", ".join(
            f"{part['class']}, {'fused' if part['fused'] else 'as it is'}"
            for part in written["optimizers"]
        ),
    }
    if faults:
        found["the first that it would refuse"] = faults[0]
    return found, not (faults or ours or later) and outside <= _MOST_OUTSIDE


def main() -> int:
    """Prints the summary; returns 1 when something is not as it has to be."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("rank")
    parser.add_argument("world")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: no fake device: {reason}", file=sys.stderr)
        return 1
    # It loads a device guard, which must be there before torch is.
    from mone_megatron.testing.fake_cuda.step import main as run_steps

    run_steps([options.rank, options.world, *options.overrides, "--json", str(options.file)])
    found, good = summary(json.loads(options.file.read_text(encoding="utf-8")))
    print(json.dumps(found))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
