"""Reads the routing trace of Megatron-LM (``--moe-routing-trace-path``).

Its ``RouterTracer`` (megatron/core/transformer/moe/router_trace.py) writes a file of JSON lines a
rank, ``router_trace_rank{rank}.jsonl``, one line a step, block, layer and microbatch:

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 128, "topk": 2, "top_indices": [[12, 45], ...]}

It holds no token ids, no weights and no number of experts; the experts of a token may stand in any
order, and its tokens lie with the batch innermost, so that neighbours are not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mone_megatron.lab.routing.trace import (
    HEADER_FILE,
    UNKNOWN_TOKEN,
    Int32Array,
    LayerShape,
    Routing,
    Tokens,
    Trace,
    TraceHeader,
    TraceWriter,
)
from mone_megatron.report.files import files_identity

FILES = "router_trace_rank*.jsonl"
_KEYS = ("step", "block", "layer", "num_tokens", "topk", "top_indices")


def is_megatron_trace(folder: Path) -> bool:
    """Returns whether a folder holds files with the names of Megatron-LM's routing trace."""
    return folder.is_dir() and any(folder.glob(FILES))


def converted(
    folder: Path, into: Path, *, experts: int | None, say: Callable[[str], None]
) -> Trace:
    """Returns the trace in ``into`` if it is of these files, and converts them there otherwise.

    Raises:
        ValueError: ``into`` is a trace of something else, or what cannot be converted.
    """
    if not (into / HEADER_FILE).is_file():
        return convert_megatron(folder, into, experts=experts, say=say)
    found = Trace(into)
    if found.header.identity != files_identity(sorted(folder.glob(FILES))):
        raise ValueError(
            f"{into}: holds the trace of another model ({found.header.name}); give another --trace"
        )
    if experts not in (None, found.header.layers[0].experts):
        raise ValueError(
            f"{into}: holds this trace with {found.header.layers[0].experts} experts; give "
            "another --trace"
        )
    say(f"{folder.name}: uses the trace in {into}")
    return found


def convert_megatron(
    folder: Path, into: Path, *, experts: int | None, say: Callable[[str], None]
) -> Trace:
    """Writes a trace of ours from Megatron-LM's; one step of one rank is in memory at a time.

    Args:
        folder: where ``router_trace_rank*.jsonl`` lie, of ranks that hold the same layers.
        into: the new trace.
        experts: how many a layer has; None for one more than the largest number in the trace.
        say: is told what is left out or taken for granted.

    Raises:
        ValueError: a line that is damaged or cut off, layers that do not fit together, an expert
            beyond ``experts``, or no tokens.
    """
    files = sorted(folder.glob(FILES))
    writer = TraceWriter(into)
    top_k: dict[int, int] = {}
    largest = windows = left_out = 0
    for file in files:
        for _, step_records in groupby(_records(file), key=lambda record: record["step"]):
            records = list(step_records)
            layers: dict[int, list[Int32Array]] = {}
            for record in records:
                if record["block"] != "decoder":
                    left_out += 1
                    continue
                # Theirs count from 0.
                layers.setdefault(record["layer"] + 1, []).append(record["experts_NK"])
            if not layers:
                continue
            routings = {
                layer: Routing(np.concatenate(parts), None, None)
                for layer, parts in sorted(layers.items())
            }
            for layer, routing in routings.items():
                if (
                    top_k.setdefault(layer, routing.experts_NK.shape[1])
                    != (routing.experts_NK.shape[1])
                ):
                    raise ValueError(f"{file}: layer {layer - 1} has several numbers of experts")
                largest = max(largest, int(routing.experts_NK.max(initial=0)))
            sizes = {len(routing.experts_NK) for routing in routings.values()}
            if len(sizes) > 1 or set(routings) != set(top_k):
                raise ValueError(
                    f"{file}: step {records[0]['step']} does not hold all layers of all its "
                    "tokens: the trace is truncated, or its ranks are of several pipeline stages; "
                    "remove what is incomplete, or give one stage's files"
                )
            count = sizes.pop()
            unknown_N = np.full(count, UNKNOWN_TOKEN, np.int32)
            # Each token a window of its own: no neighbours.
            window_N = np.arange(windows, windows + count, dtype=np.int32)
            writer.add(Tokens(unknown_N, window_N, np.zeros(count, np.int32)), routings)
            windows += count
    if not top_k:
        raise ValueError(f"{folder}: its trace holds no tokens of decoder layers; record one")
    if left_out:
        say(f"{folder}: left out {left_out} records of blocks other than the decoder")
    if experts is None:
        say(f"{folder}: taken for {largest + 1} experts, the largest number it names and one")
    elif largest >= experts:
        raise ValueError(f"--num-experts: {experts}, but {folder} names expert {largest}")
    total = largest + 1 if experts is None else experts
    return writer.close(
        TraceHeader(
            name=folder.name,
            step=None,
            identity=files_identity(files),
            layers=tuple(LayerShape(layer, total, k) for layer, k in sorted(top_k.items())),
            domains=("all",),
            selection=None,
            ordered=False,
            weighted=False,
        )
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file, with ``experts_NK`` int32 in place of ``top_indices``."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{where}: is damaged or cut off ({error}); remove the incomplete step"
                ) from error
            if not isinstance(record, dict) or any(key not in record for key in _KEYS):
                raise ValueError(f"{where}: is not a record of a routing trace")
            shape = (record["num_tokens"], record["topk"])
            try:
                experts_NK = np.asarray(record.pop("top_indices"), dtype=np.int32).reshape(shape)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{where}: its top_indices are not {shape[0]} rows of {shape[1]} experts"
                ) from error
            if experts_NK.size and experts_NK.min() < 0:
                raise ValueError(f"{where}: names expert {experts_NK.min()}")
            yield record | {"experts_NK": experts_NK}
