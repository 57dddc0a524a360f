"""Statistics of traces made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.testing as npt
import pytest
import torch
from routing_traces import make_trace

from mone_megatron.lab.routing.bits import unpack
from mone_megatron.lab.routing.statistics import Limits, measure
from mone_megatron.lab.routing.summary import summarise
from mone_megatron.mone.metrics import Usage, expert_metrics, statistics

# Six tokens in two windows, two of three experts each, neurons 4 with 2 kept.
EXPERTS = [[0, 1], [0, 1], [2, 1], [0, 2], [0, 2], [1, 0]]
KEPT = [
    ["1100", "1100"],
    ["0110", "1100"],
    ["1010", "0011"],
    ["1100", "1010"],
    ["1100", "0110"],
    ["1100", "0011"],
]
WINDOWS = [0, 0, 0, 1, 1, 1]
IDS = [7, 7, 8, 7, 8, 9]


@pytest.mark.parametrize("shards", [1, 2])
def test_statistics_by_hand(tmp_path: Path, shards: int) -> None:
    trace = make_trace(
        tmp_path / "now", {2: EXPERTS}, experts=3, kept={2: KEPT}, ids=IDS, windows=WINDOWS,
        domains=[0, 0, 0, 1, 1, 1], shards=shards, name="now",
    )  # fmt: skip
    final_experts = [[0, 1], [1, 0], [0, 1], [0, 2], [2, 0], [1, 2]]
    final_kept = [["1100", "0011"], *KEPT[1:]]
    final = make_trace(
        tmp_path / "final", {2: final_experts}, experts=3, kept={2: final_kept}, ids=IDS,
        windows=WINDOWS, domains=[0, 0, 0, 1, 1, 1], shards=shards, name="final",
    )  # fmt: skip
    limits = Limits(min_count=2, neurons_together=2, experts_together=1)
    result = measure(trace, final, limits)
    (layer,) = result.layers
    experts, neurons = layer.experts, layer.neurons
    assert neurons is not None
    assert result.vocabulary.types == 3
    npt.assert_array_equal(result.vocabulary.ids_V, [7, 8])
    npt.assert_array_equal(experts.tokens_E, [5, 4, 3])
    npt.assert_array_equal(experts.domain_DE, [[2, 3, 1], [3, 1, 2]])
    npt.assert_array_equal(experts.token_VE, [[3, 2, 1], [1, 1, 2]])
    # Top 1 agrees for tokens 0, 3 and 5; of both, 2 + 2 + 1 + 2 + 2 + 1 are in common.
    assert experts.saturation_K is not None
    npt.assert_allclose(experts.saturation_K, [3 / 6, 10 / 12])
    # Within windows only: pairs (0,1) 2, (1,2) 1, (3,4) 2, (4,5) 1 of 2.
    assert experts.adjacent == pytest.approx(6 / 8)
    npt.assert_array_equal(neurons.kept_EF, [[3, 4, 2, 1], [3, 3, 1, 1], [2, 1, 3, 0]])
    # Of expert 0 in both: token 0 2, token 1 "0110" & "1100" 1, 3 2, 4 "1100" & "0110" 1;
    # the last token has it in the first trace only.
    saturation = neurons.saturation
    assert saturation is not None
    npt.assert_array_equal(saturation.pairs_E, [4, 4, 2])
    # Expert 1: token 0 "1100" & "0011" 0, token 1 "1100" & "0110" 1, token 2 "0011" & "0011" 2,
    # token 5 "1100" & "1100" 2. Expert 2: token 3 "1010" 2, token 4 "0110" & "1100" 1.
    npt.assert_array_equal(saturation.shared_E, [6, 5, 3])
    # Adjacent: expert 0: (0,1) 1, (3,4) 2, (4,5) 0; expert 1: (0,1) 2, (1,2) 0; 2: (3,4) 1.
    npt.assert_array_equal(neurons.adjacent.pairs_E, [3, 2, 1])
    npt.assert_array_equal(neurons.adjacent.shared_E, [3, 2, 1])
    # Expert 0 of domain 0: "1100" and "0110", of domain 1: "1100" twice and "0011"; of both, 3,
    # 4, 2 and 1 of 5.
    npt.assert_array_equal(neurons.by_domain.group_EF[0], [1, 0, 0, 1])
    npt.assert_allclose(neurons.by_domain.share_EF[0], [2 / 3, 1, 1 / 2, 1 / 3], rtol=1e-6)
    npt.assert_allclose(
        neurons.by_domain.excess_EF[0], [2 / 3 - 3 / 5, 1 / 5, 1 / 10, 1 / 3 - 1 / 5], rtol=1e-5
    )
    # Only token 7 (place 0) is twice in expert 0: "1100", "0110" and "1100".
    npt.assert_array_equal(neurons.by_token.group_EF[0], [0, 0, 0, 0])
    npt.assert_allclose(neurons.by_token.share_EF[0], [2 / 3, 1, 1 / 3, 0], rtol=1e-6)
    # In expert 2 it is once, and 8 twice: "1010" and "0110".
    npt.assert_array_equal(neurons.by_token.group_EF[2], [1, 1, 1, 1])
    npt.assert_allclose(neurons.by_token.share_EF[2], [0.5, 0.5, 1, 0])
    (together,) = neurons.together
    assert together.expert == 0
    npt.assert_array_equal(together.neurons_M, [1, 0])
    npt.assert_array_equal(together.counts_MM, [[4, 3], [3, 3]])

    last = measure(final, None, limits)
    summary = summarise(layer, result.vocabulary, last.layers[0])
    assert summary.expert_saturation == pytest.approx(10 / 12)
    # Of 6 tokens 5, 4 and 3 to the experts, finally 5, 4 and 3, too; two experts of a token.
    npt.assert_array_equal(last.layers[0].experts.tokens_E, [5, 4, 3])
    assert summary.expert_saturation_by_load == pytest.approx((25 + 16 + 9) / 36 / 2)
    assert summary.expert_adjacent_by_load == pytest.approx((25 + 16 + 9) / 36 / 2)
    assert summary.neuron_saturation == pytest.approx(14 / 20)
    # Loads now and finally, over the pairs: 3 4 2 1 and 4 4 2 0 of 5 tokens, 3 3 1 1 and 1 2 3 2
    # of 4, 2 1 3 0 and 2 1 2 1 of 3.
    by_load = 4 * (12 + 16 + 4) / 25 + 4 * (3 + 6 + 3 + 2) / 16 + 2 * (4 + 1 + 6) / 9
    assert summary.neuron_saturation_by_load == pytest.approx(by_load / 20)
    assert summary.neuron_adjacent == pytest.approx(6 / 12)
    loads = neurons.kept_EF / experts.tokens_E[:, None]
    expected = (np.array([3, 2, 1]) * (loads**2).sum(axis=1)).sum() / 12
    assert summary.neuron_adjacent_by_load == pytest.approx(expected)
    assert summary.dead_neurons == pytest.approx(1 / 12)
    assert summary.load_max_over_mean == pytest.approx(5 / 4)
    # 7 goes to expert 0 in 3 of 3 cases, 8 to expert 2 in 2 of 2.
    assert summary.token_specialisation == pytest.approx(1)
    assert summary.token_specialisation_even == pytest.approx(5 / 6)


def test_neuron_load_is_what_training_logs(tmp_path: Path) -> None:
    """The same numbers as a run's ``mone/...`` metrics."""
    rng = np.random.default_rng(3)
    experts, neurons, tokens = 5, 12, 60
    # Expert 4 gets no tokens, expert 0 uses few of its neurons.
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(tokens)])
    scores = rng.random((tokens, 2, neurons)) + (chosen == 0)[..., None] * np.arange(neurons) / 4
    mask = np.zeros_like(scores, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=-1)[..., :3], True, axis=-1)
    texts = [[["".join("01"[int(b)] for b in row)][0] for row in token] for token in mask]
    trace = make_trace(tmp_path / "trace", {1: chosen.tolist()}, experts=experts, kept={1: texts})
    (layer,) = measure(trace).layers
    summary = summarise(layer, measure(trace).vocabulary)

    usage = Usage(
        num_local_experts=experts,
        first_expert=0,
        num_experts=experts,
        neuron_group=None,
        replica_group=None,
    )
    flat = torch.from_numpy(chosen.reshape(-1))
    one_hot_ET = torch.nn.functional.one_hot(flat, experts).T.float()
    mask_TF = torch.from_numpy(mask.reshape(-1, neurons))
    usage.add_tokens(one_hot_ET.sum(dim=1))
    usage.add_selection(
        kept_EF=one_hot_ET @ mask_TF.float(),
        activation_TF=torch.ones(mask_TF.shape),
        mask_TF=mask_TF,
        expert_ET=one_hot_ET,
    )
    sums = usage.sums(usage.counts(torch.device("cpu")))
    logged = expert_metrics(statistics(sums[:, :-1], sums[:, -1]), with_neurons=True)
    assert summary.neuron_load_entropy == pytest.approx(logged["mone/load_entropy"])
    assert summary.dead_neurons == pytest.approx(logged["mone/dead_neuron_share"])
    assert summary.dead_neurons > 0
    assert summary.neuron_load_max_over_mean == pytest.approx(logged["mone/load_max_over_mean"])
    assert summary.dead_experts == logged["router/dead_experts"] == 1


def test_tables_are_bounded(tmp_path: Path) -> None:
    trace = make_trace(
        tmp_path / "trace", {2: EXPERTS}, experts=3, kept={2: KEPT}, ids=IDS, windows=WINDOWS
    )
    room_for_one = 3 * 4 * 8
    (layer,) = measure(trace, limits=Limits(min_count=1, table_bytes=room_for_one)).layers
    assert layer.neurons is not None
    assert layer.neurons.told_apart == 1
    assert set(layer.neurons.by_token.group_EF.flat) <= {-1, 0}
    assert layer.experts.token_VE.shape == (3, 3)
    few = measure(trace, limits=Limits(min_count=1, expert_tokens=2))
    npt.assert_array_equal(few.vocabulary.ids_V, [7, 8])


def test_many_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.permutation(300)[:8].tolist() for _ in range(40)]
    (layer,) = measure(make_trace(tmp_path / "trace", {1: rows}, experts=300)).layers
    assert layer.experts.tokens_E.sum() == 320
    assert layer.neurons is None
    npt.assert_array_equal(np.diagonal(layer.experts.together_EE), layer.experts.tokens_E)


def test_shards_that_lie_otherwise_are_refused(tmp_path: Path) -> None:
    one = make_trace(tmp_path / "one", {2: EXPERTS}, experts=3, shards=1, name="one")
    two = make_trace(tmp_path / "two", {2: EXPERTS}, experts=3, shards=2, name="two")
    with pytest.raises(ValueError, match="--batch-size"):
        measure(one, two)


def test_bits_of_a_trace_are_the_neurons(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", {2: EXPERTS}, experts=3, kept={2: KEPT})
    (routing,) = trace.routings(2)
    assert routing.kept_NKB is not None
    rows = unpack(routing.kept_NKB, 4)[2, 0]
    assert "".join(map(str, rows)) == "1010"
