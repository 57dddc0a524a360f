"""Compares the Triton kernels with the reference, on a GPU or in the interpreter, in few variants.

The tests have more of them (``pytest --gpu tests/kernels``), and compile for minutes. Masks are
compared bit for bit. Prints JSON as its last line.

Shape suffixes: T rows, F neurons.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mone_megatron.command_line import Parser

if TYPE_CHECKING:
    from torch import Tensor

# Of the largest value: bf16 results are rounded once more than the reference's.
_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-5}


@dataclass(frozen=True)
class Case:
    """Describes one call of the kernels."""

    neurons: int
    dtype: str = "bf16"
    score: str = "abs_activation"
    packed: bool = False
    # "": normal numbers; "nan": some are NaN; "ties": all scores are multiples of a quarter.
    odd: str = ""
    # Gate and up are columns of a wider matrix, so that rows are not aligned.
    shifted: bool = False
    # Of others than "topk" the kernels are given the mask, which is compared with the CPU's.
    rule: str = "topk"

    def __str__(self) -> str:
        parts = [f"f={self.neurons}", self.dtype, self.score, self.odd]
        parts += [self.rule] * (self.rule != "topk")
        parts += ["packed"] * self.packed + ["odd strides"] * self.shifted
        return ", ".join(part for part in parts if part)


def cases(largest: int) -> Iterator[Case]:
    """Yields the cases of at most ``largest`` neurons, and some that are small."""
    from mone_megatron.methods.rules import RULES
    from mone_megatron.methods.scores import SCORES

    for neurons in (48, 176, 704, 1024, 1408, 2048):
        if neurons <= largest:
            yield Case(neurons)
            yield Case(neurons, "fp32")
    for score in SCORES:
        if "down_norm" not in score.reads:
            yield Case(176, score=score.name)
    yield Case(176, packed=True)
    yield Case(176, "fp32", packed=True)
    for odd in ("nan", "ties"):
        yield Case(176, odd=odd)
        yield Case(176, "fp32", odd=odd)
    yield Case(176, shifted=True)
    others = [rule.name for rule in RULES if not rule.top_k]
    for index, name in enumerate(others):
        # Sums of such scores are exact, in whatever order a device adds them up.
        dtype = ("bf16", "fp32")[index % 2]
        yield Case(64, dtype, score="abs_gate", odd="ties", rule=name)


def _inputs(case: Case, rows: int, device: str) -> tuple[Tensor, Tensor]:
    import torch

    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(case.neurons)
    both_TF = torch.randn(rows, 2 * case.neurons + case.shifted, generator=generator)
    if case.odd == "ties":
        both_TF = (both_TF * 4).round() / 4
    if case.odd == "nan":
        both_TF[torch.rand(both_TF.shape, generator=generator) < 1e-3] = float("nan")
    both_TF = both_TF.to(device, dtype)[:, case.shifted :]
    gate_TF, up_TF = both_TF.chunk(2, dim=-1)
    return gate_TF.detach().requires_grad_(), up_TF.detach().requires_grad_()


def rule_mask(case: Case, gate_TF: Tensor, largest_of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Returns what a rule keeps in training, of rows of five experts whose tokens have two."""
    import torch

    from mone_megatron.methods.rule import Rows
    from mone_megatron.methods.rules import RULES

    rule, device = RULES[case.rule], gate_TF.device
    row_T = torch.arange(len(gate_TF), device=device)
    rows = Rows(
        scores_TF=gate_TF.detach().abs(),
        budget=rule.budget(0.25, case.neurons),
        largest_of=largest_of,
        expert_T=row_T % 5,
        num_experts=5,
        # Half of the experts have a threshold.
        state={name: (torch.arange(5, device=device) % 2).float() * 0.7 for name in rule.state},
        training=True,
        token_T=row_T // 2,
        weight_T=(row_T % 4 + 1) / 4,
    )
    return rule.mask(rows)


def compare(case: Case, *, rows: int, device: str) -> str | None:
    """Returns what differs from the reference, or None. One segment has no rows."""
    import torch
    import torch.nn.functional as F

    from mone_megatron.kernels import fused, reference
    from mone_megatron.kernels.reference import Keep, Packed, TopK, WeightSums

    gate_TF, up_TF = _inputs(case, rows, device)
    kept = case.neurons // 4
    keep: Keep = TopK(kept, case.score)
    if case.rule != "topk":
        keep = rule_mask(case, gate_TF, fused.topk_mask)
        wanted_TF = rule_mask(case, gate_TF.cpu(), reference.topk_mask)
        if not torch.equal(keep.cpu(), wanted_TF):
            return "the mask differs from the CPU's"
    scale_T = torch.linspace(0.1, 1, rows, device=device)
    segment_T = (torch.arange(rows, device=device) * 3) // rows + 1
    sums = WeightSums(segment_T, 5, "selected", True, in_order=True)
    packed = Packed(kept) if case.packed else None
    hidden_TF, weights_SF, kept_SF = fused.fused_glu(
        gate_TF, up_TF, scale_T, keep, activate=F.silu, packed=packed, sums=sums
    )
    assert weights_SF is not None
    assert kept_SF is not None
    mask_TF = reference.kept_mask(gate_TF.detach(), up_TF.detach(), keep, F.silu)
    assert mask_TF is not None
    exact = [tensor.detach().float().requires_grad_() for tensor in (gate_TF, up_TF)]
    expected_TF = reference.selected_glu(exact[0], exact[1], mask_TF, scale_T, F.silu)
    expected_SF, counts_SF = reference.weight_sums(exact[0], mask_TF, sums, F.silu)
    if not torch.equal(kept_SF, counts_SF):
        return "the neurons that are kept differ"
    grad_TF = torch.randn(rows, case.neurons, generator=torch.Generator().manual_seed(1)).to(device)
    grad_TF = grad_TF.to(hidden_TF.dtype)
    ours = torch.autograd.grad(
        [hidden_TF, weights_SF], [gate_TF, up_TF], [grad_TF, weights_SF.detach()]
    )
    theirs = torch.autograd.grad(
        [expected_TF, expected_SF], exact, [grad_TF.float(), expected_SF.detach()]
    )
    pairs = {
        "hidden values": (hidden_TF, expected_TF),
        "sums": (weights_SF, expected_SF),
        "gradient of gate": (ours[0], theirs[0]),
        "gradient of up": (ours[1], theirs[1]),
    }
    for name, (actual, expected) in pairs.items():
        wanted = expected.detach().float()
        apart = (actual.detach().float() - wanted).abs()
        nans = actual.isnan() != wanted.isnan()
        if case.odd != "nan" and nans.any():
            return f"{name}: NaN where the reference has none"
        worst = float(apart.nan_to_num().max() / wanted.nan_to_num().abs().max().clamp_min(1e-6))
        if worst > _TOLERANCE[case.dtype]:
            return f"{name} differ by {worst:.2g} of the largest"
    return None


def main() -> int:
    """Prints the result of each case; returns 1 when one differs."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--largest", type=int, default=2048, help="neurons (default 2048)")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    differ, count, began = {}, 0, time.perf_counter()
    for case in cases(options.largest):
        problem = compare(case, rows=options.rows, device=options.device)
        count += 1
        print(f"{case}: {problem or 'equal'}", flush=True)
        if problem:
            differ[str(case)] = problem
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"cases": count, "differ": differ, "seconds with compilation": seconds}))
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
