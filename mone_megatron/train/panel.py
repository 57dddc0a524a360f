"""What a panel step found: every expert of every layer in a few numbers, as ``panel.jsonl`` has it.

docs/metrics.md says what each number means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Mlp: TypeAlias = Literal["routed", "shared", "dense"]
# Digits that are kept, so that a file of many experts stays small.
_DIGITS = 4


@dataclass(frozen=True)
class LayerUse:
    """Holds the experts of one layer at one step; a shared expert or a dense layer is one expert.

    Attributes:
        mlp: which of the layer's MLPs.
        layer: from 1.
        experts: name of a statistic -> a value an expert; NaN where there is none. ``tokens`` is
            always there, the others where neurons were selected.
        balance_loss: the layer's neuron balance loss; None where there is none.
    """

    mlp: Mlp
    layer: int
    experts: Mapping[str, tuple[float, ...]]
    balance_loss: float | None


@dataclass(frozen=True)
class Panel:
    """Holds all layers at one step. Values are rounded, so that reading one back gives the same."""

    step: int
    layers: tuple[LayerUse, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Panel:
        """Returns the panel of a line of ``panel.jsonl``, parsed."""
        return cls(record["step"], tuple(_layer(layer) for layer in record["layers"]))

    def to_json_line(self) -> str:
        """Returns one line of ``panel.jsonl``: strict JSON, null for what is not finite."""
        layers = [
            {
                "mlp": use.mlp,
                "layer": use.layer,
                "balance_loss": use.balance_loss,
                **{name: [_plain(value) for value in row] for name, row in use.experts.items()},
            }
            for use in self.layers
        ]
        record = {"step": self.step, "layers": layers}
        return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"


def rounded(value: float) -> float:
    """Rounds to the digits that a panel keeps; whole numbers stay, NaN is what is not finite."""
    if not math.isfinite(value):
        return math.nan
    return value if value == int(value) else float(f"{value:.{_DIGITS}g}")


def _plain(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else value


def _layer(record: dict[str, Any]) -> LayerUse:
    rows = {name: row for name, row in record.items() if isinstance(row, list)}
    experts = {
        name: tuple(math.nan if value is None else float(value) for value in row)
        for name, row in rows.items()
    }
    return LayerUse(record["mlp"], record["layer"], experts, record["balance_loss"])
