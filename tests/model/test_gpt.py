"""The loss over a padded vocabulary, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from gpt_ranks import ROWS, later_losses_by_hand, loss_by_hand, train

from mone_megatron.testing.processes import Processes, run_in_processes
from mone_megatron.testing.trainer import VOCABULARY


def test_padding_is_not_in_the_softmax() -> None:
    ((ours, expected),) = run_in_processes(1, loss_by_hand)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_layouts_agree_and_padding_stays_zero(two_processes: Processes, tied: bool) -> None:
    (alone,) = run_in_processes(1, train, 1, tied)
    first, second = two_processes.run(train, 2, tied)
    assert first[0] == second[0]
    assert first[0] == pytest.approx(alone[0], rel=1e-5)
    assert alone[0][-1] < alone[0][0]
    for kind in (1, 2):
        assert alone[kind].shape[0] == ROWS
        assert not alone[kind][VOCABULARY:].any()
        assert not second[kind][VOCABULARY - ROWS // 2 :].any()
        assert alone[kind][:VOCABULARY].any(dim=-1).all()


def test_later_tokens_are_predicted_as_the_definition_says() -> None:
    ((ours, expected),) = run_in_processes(1, later_losses_by_hand)
    assert ours.shape == (2,)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
