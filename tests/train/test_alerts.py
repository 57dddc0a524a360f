"""The rules of the alerts, by hand; that they hold in real runs is in tests/integration."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.train.health.alerts import Alert, AlertMonitor
from mone_megatron.train.panel import LayerUse, Panel, rounded

EXPERTS, NEURONS, KEPT = 8, 64, 16
EVEN: dict[str, float] = {
    "tokens": 128,
    "load_entropy": 1.0,
    "dead_neuron_share": 0.0,
    "load_balance": 1.0,
    "kept_activation": 0.2,
}


@functools.cache
def _config(*overrides: str) -> Config:
    """tiny_mone: 8 experts, 2 a token, 16 of 64 neurons."""
    return compose(["experiment=tiny_mone", "logging.alerts.patience=2", *overrides])


def _use(layer: int = 1, loss: float | None = 1.0, **changes: dict[int, float] | float) -> LayerUse:
    """An even layer, but for some experts (or all of them)."""
    experts = {}
    for name, value in EVEN.items():
        change = changes.get(name, {})
        if not isinstance(change, dict):
            change = dict.fromkeys(range(EXPERTS), change)
        experts[name] = tuple(change.get(expert, value) for expert in range(EXPERTS))
    return LayerUse("routed", layer, experts, loss)


def _run(config: Config, layers: Sequence[Sequence[LayerUse]]) -> list[Alert]:
    """One panel of each of ``layers``, ten steps apart."""
    monitor = AlertMonitor(config)
    alerts = []
    for step, uses in enumerate(layers, start=1):
        alerts += monitor.update(Panel(10 * step, tuple(uses)))
    return alerts


def _told(alerts: Sequence[Alert]) -> list[tuple[int, str, str, int, int | None]]:
    return [(one.step, one.event, one.kind, one.layer, one.expert) for one in alerts]


def _entropy(spread: float, kept: int = KEPT, neurons: int = NEURONS) -> float:
    """The load entropy over log f of a load that is spread by so much."""
    return (math.log(kept) + spread * math.log(neurons / kept)) / math.log(neurons)


def test_a_dead_expert_begins_once_and_ends_once() -> None:
    dead, fine = [_use(), _use(2, tokens={5: 6})], [_use(), _use(2)]
    # 6 of 7 * 128 + 6 tokens: 0.053 of a fair share.
    low = [_use(), _use(2, tokens={5: 5})]
    alerts = _run(_config(), [fine, low, fine, low, low, low, fine, low, fine, fine, fine, dead])
    assert _told(alerts) == [(50, "begin", "dead_expert", 2, 5), (100, "end", "dead_expert", 2, 5)]
    begin = alerts[0]
    assert begin.value == pytest.approx(5 * 8 / (7 * 128 + 5))
    assert begin.threshold == 0.05
    for part in ("layer 2, expert 5", "0.0444", "logging.alerts.dead_expert=0.05", "look at"):
        assert part in begin.message


def test_dead_neurons() -> None:
    alerts = _run(_config(), [[_use(dead_neuron_share={3: 0.51, 4: 0.5})]] * 3)
    assert _told(alerts) == [(20, "begin", "dead_neurons", 1, 3)]
    assert alerts[0].value == 0.51


def test_collapse_of_neurons_is_measured_between_always_the_same_and_even() -> None:
    entropies = {1: _entropy(0.09), 2: _entropy(0.11), 3: _entropy(0.0)}
    alerts = _run(_config(), [[_use(load_entropy=entropies)]] * 3)
    assert _told(alerts) == [
        (20, "begin", "load_collapse", 1, 1),
        (20, "begin", "load_collapse", 1, 3),
    ]
    assert alerts[0].value == pytest.approx(0.09)
    assert alerts[1].value == pytest.approx(0.0, abs=1e-9)


def test_collapse_of_the_router() -> None:
    # Nearly all to the same two experts: that names the layer, and the six others are dead.
    tokens = {expert: 3 for expert in range(2, 8)} | {0: 503, 1: 503}
    alerts = _run(_config(), [[_use(3, tokens=tokens)]] * 2)
    collapse = [alert for alert in alerts if alert.kind == "load_collapse"]
    assert [alert.layer for alert in collapse] == [3]
    assert "router" in collapse[0].message
    assert Counter(alert.kind for alert in alerts) == {"load_collapse": 1, "dead_expert": 6}


def test_few_tokens_are_not_judged() -> None:
    # Of 39 tokens each neuron is kept by 9.75 on average: whether more are dead is chance.
    few = {"tokens": {0: 39}, "dead_neuron_share": {0: 0.9}, "load_entropy": {0: 0.7}}
    assert _told(_run(_config(), [[_use(**few)]] * 4)) == []
    few["tokens"] = {0: 40}
    assert len(_run(_config(), [[_use(**few)]] * 4)) == 2
    # Nor does a step that is not judged end, or delay, anything.
    unknown = _use(tokens={0: 0}, dead_neuron_share={0: math.nan})
    off = ("logging.alerts.dead_expert=0", "logging.alerts.load_collapse=0")
    layers = [[_use(**few)], [unknown], [_use(**few)], [unknown], [unknown], [unknown]]
    assert _told(_run(_config(*off), layers)) == [(30, "begin", "dead_neurons", 1, 0)]


RAW = ("mone.balance.normalize=false", "mone.balance.coeff=0.5")


def _shrunken(activation: float, loss: float, balance: float = 2.0) -> list[LayerUse]:
    """Expert 6 most of all."""
    by_expert = dict.fromkeys(range(EXPERTS), activation) | {6: activation / 2}
    return [_use(loss=loss, kept_activation=by_expert, load_balance=balance)]


def test_shrinking_weights() -> None:
    start = [_use(loss=4.0, load_balance=2.0)]
    shrink = [start, _shrunken(0.15, 3.0), _shrunken(0.09, 1.5), _shrunken(0.08, 1.2)]
    alerts = _run(_config(*RAW), shrink)
    assert _told(alerts) == [(40, "begin", "shrinking_weights", 1, 6)]
    assert alerts[0].value == pytest.approx(1 - 0.08 * 7.5 / 8 / 0.2)
    for part in ("expert 6", "since step 10", "from 4 to 1.2", "normalize=true"):
        assert part in alerts[0].message
    # Not when the load became more even, when the loss did not fall, ...
    even = [start, *(_shrunken(0.05, 1.0, balance=1.5) for _ in range(3))]
    assert _run(_config(*RAW), even) == []
    stays = [start, *(_shrunken(0.05, 4.0) for _ in range(3))]
    assert _run(_config(*RAW), stays) == []
    # ... nor where weights cannot lower the loss: normalised, or not trained on.
    assert _run(_config(), shrink) == []
    assert _run(_config("mone.balance.normalize=false", "mone.balance.coeff=0"), shrink) == []


def test_shared_and_dense_mlps_are_named() -> None:
    config = _config("model.shared_expert_ffn_hidden_size=128", "mone.apply_to=[routed,shared]")
    experts = {name: (value,) for name, value in EVEN.items()} | {"dead_neuron_share": (0.7,)}
    (alert,) = _run(config, [[LayerUse("shared", 4, experts, None)]] * 2)
    assert alert.message.startswith("dead_neurons: layer 4, shared MLP: 70.0% of the 128 neurons")
    assert "mone/shared/dead_neuron_share_max/layer_4" in alert.message


def test_without_selection_only_the_router_is_judged() -> None:
    use = LayerUse("routed", 1, {"tokens": (0.0, *[146.0] * 7)}, None)
    alerts = _run(compose(["experiment=tiny_moe", "logging.alerts.patience=2"]), [[use]] * 2)
    assert _told(alerts) == [(20, "begin", "dead_expert", 1, 0)]


def test_the_schedule_of_the_keep_ratio_moves_what_collapse_means() -> None:
    schedule = (
        "mone.keep_ratio_schedule=linear",
        "mone.keep_ratio_start=0.5",
        "mone.keep_ratio_steps=1000",
    )
    # Always the same half: with a quarter kept that would be half way to even.
    always = [_use(load_entropy=_entropy(0.0, kept=32))]
    assert len(_run(_config(*schedule), [always] * 2)) == EXPERTS
    assert _run(_config(), [always] * 2) == []


numbers = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.8, 1.0, math.nan])
layer_uses = st.builds(
    lambda tokens, dead, entropy, activation, balance, loss: LayerUse(
        "routed",
        1,
        {
            "tokens": tuple(tokens),
            "dead_neuron_share": tuple(dead),
            "load_entropy": tuple(entropy),
            "kept_activation": tuple(activation),
            "load_balance": tuple(1 + 3 * value for value in balance),
        },
        loss,
    ),
    st.lists(st.sampled_from([0.0, 5.0, 40.0, 300.0]), min_size=3, max_size=3),
    *[st.lists(numbers, min_size=3, max_size=3)] * 4,
    st.sampled_from([0.1, 0.5, 2.0]),
)
panels = st.lists(layer_uses, min_size=1, max_size=12).map(
    lambda uses: [Panel(step, (use,)) for step, use in enumerate(uses, start=1)]
)


@given(panels=panels, patience=st.integers(1, 3))
def test_alerts_alternate_and_follow_from_the_file(panels: list[Panel], patience: int) -> None:
    config = _config(*RAW, f"logging.alerts.patience={patience}")
    live, again = AlertMonitor(config), AlertMonitor(config)
    begun: Counter[tuple[object, ...]] = Counter()
    for panel in panels:
        alerts = live.update(panel)
        read = Panel.from_record(json.loads(panel.to_json_line()))
        assert again.update(read) == alerts
        for alert in alerts:
            place = (alert.kind, alert.part, alert.layer, alert.expert)
            begun[place] += 1 if alert.event == "begin" else -1
            assert begun[place] in (0, 1)
    assert sum(begun.values()) == len(live.active)


def test_off_means_off() -> None:
    off = (
        "logging.alerts.dead_expert=0",
        "logging.alerts.dead_neurons=1",
        "logging.alerts.load_collapse=0",
        "logging.alerts.shrinking_weights=1",
    )
    worst = _use(
        loss=0.0,
        tokens={0: 0, 1: 0},
        dead_neuron_share=1.0,
        load_entropy=_entropy(0.0),
        kept_activation=0.0,
    )
    assert _run(_config(*RAW, *off), [[_use()], [worst], [worst], [worst]]) == []


def test_panel_lines_are_strict_json() -> None:
    use = replace(_use(kept_activation={0: math.nan, 1: rounded(math.inf)}), balance_loss=None)
    line = Panel(7, (use,)).to_json_line()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["layers"][0]["kept_activation"][:3] == [None, None, 0.2]
    assert record["layers"][0]["tokens"] == [128] * EXPERTS
    assert ".0" not in line
