"""Makes plans out of what a calibration text says, and keeps what they need in the results file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mone_megatron.lab.sparsification.engine import Engine, Text, Watchers
from mone_megatron.lab.sparsification.findings import Kind, Layer
from mone_megatron.lab.sparsification.kept_results import Results
from mone_megatron.lab.sparsification.plans import EXPERT, THRESHOLD, Cut, Made, Plan, dense
from mone_megatron.lab.sparsification.progress import WorkProgress
from mone_megatron.lab.sparsification.ranking import Choose, Rows
from mone_megatron.lab.sparsification.thresholds import ScoreCounts


@dataclass(frozen=True)
class Calibration:
    """Looks at the unpruned model on one text.

    Attributes:
        label: what the model is called.
        text: to calibrate on.
        layers: of the model.
        engine: opens it when it is first needed.
        results: what is known already, and where new things are kept.
    """

    label: str
    text: Text
    layers: tuple[Layer, ...]
    engine: Callable[[], Engine]
    results: Results

    def key(self, **what: Any) -> dict[str, Any]:
        """Returns the key of something that this text says about this model."""
        return {"model": self.label, "calibration": self.text.fingerprint} | what

    def watch(self, watchers: Watchers, what: str) -> None:
        """Shows the unpruned model's rows to ``watchers``, telling how far it is."""
        ready = self.engine()
        work = ready.work([dense(len(self.layers))], self.text)
        with WorkProgress(f"{self.label}: {what}", work) as progress:
            ready.watch(watchers, self.text, progress.add)

    def places(self) -> Iterable[tuple[int, int]]:
        """Yields every place, by layer and index."""
        for layer in self.layers:
            for index in range(len(layer.kinds)):
                yield layer.number, index

    def threshold_plans(
        self, scores: Sequence[str], shares: Sequence[float], of: str
    ) -> dict[tuple[str, float], Plan]:
        """Returns the plan that cuts at calibrated thresholds, by score and wanted share above 0.

        Args:
            scores: what is compared with thresholds.
            shares: of the neurons that are to be below, on this text.
            of: whether a threshold is of a layer or of each expert.

        Raises:
            ValueError: no token of the text reached an expert that needs a threshold.
        """
        wanted = [(score, share) for score in scores for share in shares if share]

        def key(score: str, share: float) -> dict[str, Any]:
            return self.key(thresholds=score, share=share, of=of)

        missing = [pair for pair in wanted if self.results.get(key(*pair)) is None]
        todo = list(dict.fromkeys(score for score, _ in missing))
        if todo:
            counts = {
                (number, index, score): ScoreCounts(
                    score, number, self.kind(number, index).experts if of == EXPERT else 1
                )
                for number, index in self.places()
                for score in todo
            }
            watchers: dict[tuple[int, int], Choose] = {
                place: Several([counts[(*place, score)] for score in todo])
                for place in self.places()
            }
            self.watch(watchers, "thresholds")
            for score, share in missing:
                cuts = [
                    [
                        counts[layer.number, index, score].thresholds(share, kind.neurons)
                        for index, kind in enumerate(layer.kinds)
                    ]
                    for layer in self.layers
                ]
                self.results.add(key(score, share), {"layers": cuts})
        return {
            (score, share): self._cut_plan(score, share, of, key(score, share))
            for score, share in wanted
        }

    def _cut_plan(self, score: str, share: float, of: str, key: dict[str, Any]) -> Plan:
        cuts = self.results.read(key, lambda kept: kept["layers"])
        choices = tuple(
            Cut(score, tuple(tuple(map(float, place)) for place in layer)) if layer else None
            for layer in cuts
        )
        made = Made(THRESHOLD, f"of each {of}", choices)
        return Plan(score, (share,) * len(self.layers), made)

    def routed(self) -> list[tuple[int, int]]:
        """Returns the places of routed experts, by layer and index."""
        return [
            (number, index)
            for number, index in self.places()
            if self.kind(number, index).target == "routed"
        ]

    def kind(self, number: int, index: int) -> Kind:
        """Returns what a place is."""
        return self.layers[number].kinds[index]


class Several:
    """Shows rows to several watchers; it is a ``ranking.Choose`` that keeps all neurons."""

    def __init__(self, watchers: Sequence[Choose]) -> None:
        self._watchers = tuple(watchers)

    def __call__(self, rows: Rows) -> None:
        """Shows the rows to each."""
        for watcher in self._watchers:
            watcher(rows)


def check_length(text: Text, least: int) -> None:
    """Checks that a calibration text is long enough.

    Raises:
        ValueError: it is not.
    """
    if text.tokens < least:
        raise ValueError(
            f"--calibration: {text.name} has {text.tokens} tokens, and at least {least} are "
            "needed; give a longer text, or more --calibration-tokens"
        )
