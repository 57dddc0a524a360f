"""Traces made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mone_megatron.kernels.packed import pack_bits
from mone_megatron.lab.routing.trace import (
    LayerShape,
    Routing,
    Selection,
    Tokens,
    Trace,
    TraceHeader,
    TraceWriter,
)


def make_trace(
    folder: Path,
    layers: Mapping[int, Sequence[Sequence[int]]],
    *,
    experts: int,
    ids: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    kept: Mapping[int, Sequence[Sequence[str]]] | None = None,
    shards: int = 1,
    name: str = "model",
    step: int | None = None,
    identity: str | None = None,
    domain_names: Sequence[str] | None = None,
) -> Trace:
    """``layers``: of each token its experts; ``kept``: of each of these the neurons as 0 and 1."""
    tokens = len(next(iter(layers.values())))
    ids_N = np.asarray(ids if ids is not None else range(tokens), np.int32)
    windows_N = np.asarray(windows if windows is not None else [0] * tokens, np.int32)
    domains_N = np.asarray(domains if domains is not None else [0] * tokens, np.int32)
    neurons = len(next(iter(kept.values()))[0][0]) if kept else 0
    writer = TraceWriter(folder)
    for part in np.array_split(np.arange(tokens), shards):
        routings = {}
        for layer, rows in layers.items():
            experts_NK = np.asarray(rows, np.int32)[part]
            bits = None
            if kept:
                mask = [[[c == "1" for c in text] for text in row] for row in kept[layer]]
                bits = pack_bits(torch.tensor(mask)).numpy()[part]
            weights = np.full(experts_NK.shape, 1 / experts_NK.shape[1], np.float32)
            routings[layer] = Routing(experts_NK, weights, bits)
        writer.add(Tokens(ids_N[part], windows_N[part], domains_N[part]), routings)
    return writer.close(
        TraceHeader(
            name=name,
            step=step,
            identity=identity or name,
            layers=tuple(
                LayerShape(
                    layer,
                    experts,
                    len(rows[0]),
                    neurons,
                    kept[layer][0][0].count("1") if kept else 0,
                )
                for layer, rows in layers.items()
            ),
            domains=tuple(domain_names or [f"d{n}" for n in range(int(domains_N.max()) + 1)]),
            selection=Selection(0.5, "abs_activation", "model") if kept else None,
            texts={int(token): f"<{token}>" for token in ids_N},
        )
    )
