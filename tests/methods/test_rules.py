"""Every registered rule, by being registered."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels import reference
from mone_megatron.methods.rule import Rule
from mone_megatron.methods.rules import RULES
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector
from mone_megatron.testing.processes import Processes

EXPERTS, ROWS, NEURONS = 3, 240, 64
by_name = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up projections, and the expert of each row."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, ROWS, NEURONS, generator=generator)
    return gate, up, torch.randint(EXPERTS, (ROWS,), generator=generator).sort().values


def selector(
    rule: str, keep_ratio: float = 0.25, group: dist.ProcessGroup | None = None
) -> NeuronSelector:
    selection = NeuronSelection(keep_ratio, RULES[rule].score or "abs_gate", rule)
    return NeuronSelector(selection, NEURONS, group, num_local_experts=EXPERTS, num_experts=EXPERTS)


def settle(module: NeuronSelector, steps: int = 60) -> None:
    """Trains the state of a rule, if it has one, on rows of the same kind."""
    module.train()
    for seed in range(steps if module.rule.state else 0):
        module(*rows(seed + 100), observing=True)
        module.advance(applied=True)


@by_name
@pytest.mark.parametrize("keep_ratio", [0.25, 0.5])
def test_it_keeps_its_budget(rule: Rule, keep_ratio: float) -> None:
    module = selector(rule.name, keep_ratio)
    settle(module)
    for training in (True, False):
        mask = module.train(training)(*rows())
        assert mask.dtype is torch.bool
        kept = mask.sum(dim=-1)
        assert int(kept.max()) <= rule.most_kept(module.budget)
        if rule.fixed_count:
            assert kept.eq(module.kept).all()
        elif rule.keeps_budget:
            assert mask.float().mean().item() == pytest.approx(keep_ratio, rel=0.1)


@by_name
def test_rows_that_hold_a_nan_keep_nothing(rule: Rule) -> None:
    gate, up, expert = rows()
    gate[5, 3] = torch.nan
    mask = selector(rule.name).eval()(gate, up, expert)
    assert not mask[5].any()


@by_name
def test_a_causal_rule_looks_at_no_other_token(rule: Rule) -> None:
    module = selector(rule.name)
    settle(module, steps=5)
    module.eval()
    gate, up, expert = rows()
    changed = gate.clone()
    changed[ROWS // 2 :] *= 3
    same = torch.equal(
        module(gate, up, expert)[: ROWS // 2], module(changed, up, expert)[: ROWS // 2]
    )
    assert same == rule.causal


@by_name
def test_gradients_flow_through_kept_neurons_only(rule: Rule) -> None:
    gate, up, expert = (tensor[:9] for tensor in rows())
    mask = selector(rule.name)(gate, up, expert)
    gate, up = (tensor.double().requires_grad_() for tensor in (gate, up))

    def glu(gate: Tensor, up: Tensor) -> Tensor:
        return reference.selected_glu(gate, up, mask, None)

    assert torch.autograd.gradcheck(glu, (gate, up))
    grads = torch.autograd.grad(glu(gate, up).sum(), (gate, up))
    assert not any(grad[~mask].any() for grad in grads)


@by_name
def test_a_state_belongs_to_its_expert(rule: Rule) -> None:
    """What the rows of one expert say moves the state of that expert only."""
    if not rule.state:
        pytest.skip("has no state")
    module = selector(rule.name).train()
    gate, up, _ = rows()
    module(gate, up, torch.ones(ROWS, dtype=torch.int64), observing=True)
    before = {name: value.clone() for name, value in module.state.items()}
    module.advance(applied=True)
    moved = [value != before[name] for name, value in module.state.items()]
    assert any(bool(flags[1]) for flags in moved)
    assert not any(bool(flags[0]) or bool(flags[2]) for flags in moved)
    # A step that is thrown away leaves everything as it was.
    before = {name: value.clone() for name, value in module.state.items()}
    module(gate, up, torch.ones(ROWS, dtype=torch.int64), observing=True)
    module.advance(applied=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state.items())


def part_of_the_mask(rule: str) -> Tensor:
    gate, up, expert = rows()
    rank, size = dist.get_rank(), dist.get_world_size()
    module = selector(rule, group=dist.group.WORLD)
    return module(gate.chunk(size, dim=-1)[rank], up.chunk(size, dim=-1)[rank], expert)


@by_name
def test_neurons_spread_over_ranks(rule: Rule, two_processes: Processes) -> None:
    if rule.exchange == "refused":
        with pytest.raises(Exception, match=f"mone.rule={rule.name} cannot select over ranks"):
            two_processes.run(part_of_the_mask, rule.name)
        return
    whole = torch.cat(two_processes.run(part_of_the_mask, rule.name), dim=-1)
    assert torch.equal(whole, selector(rule.name)(*rows()))


@by_name
def test_a_schedule_may_begin_and_end_with_all_neurons(rule: Rule) -> None:
    """There the layer has a selector, which keeps whatever the rule does not leave out itself."""
    module = selector(rule.name)
    module.set_keep_ratio(1.0)
    settle(module, steps=2)
    gate, up, expert = rows()
    gate[1, 3] = float("nan")
    mask = module.train()(gate, up, expert)
    assert not mask[1].any()
    if rule.fixed_count or rule.keeps_budget:
        others = torch.arange(len(mask)) != 1
        assert mask[others].float().mean() > 0.97


@by_name
def test_all_neurons_are_the_plain_expert(rule: Rule) -> None:
    """A full budget is no selection: the layer then has no selector at all."""
    assert rule.budget(1.0, NEURONS).kept == NEURONS
