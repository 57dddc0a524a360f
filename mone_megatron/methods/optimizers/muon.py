"""Moves matrices along the orthogonalised momentum of their gradients, all else by AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mone_megatron.methods.optimizer import Optimizer, is_matrix

if TYPE_CHECKING:
    import torch

# Of the quintic Newton-Schulz iteration, and how often it is applied (Jordan 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# An orthogonal matrix scaled by this times the root of its larger side has the root mean square of
# AdamW's updates, so that its learning rate and weight decay serve (arXiv 2502.16982).
_ADAM_SCALE = 0.2


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Returns matrices with the same singular vectors, and singular values near 1.

    Args:
        matrices: ``[..., rows, columns]``, each one by itself: of expert weights every expert's and
            every projection's. Of any dtype; computed in fp32.
    """
    found = matrices.float()
    wide = found.shape[-2] <= found.shape[-1]
    if not wide:
        found = found.mT
    # The iteration converges for singular values up to 1; the Frobenius norm bounds them.
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found if wide else found.mT


def make(groups: list[dict[str, Any]], optim: Any) -> torch.optim.Optimizer:
    """Returns the optimizer; momentum is ``optim.beta1`` for both kinds of parameters."""
    import torch

    class Muon(torch.optim.Optimizer):
        """Moves matrices by Muon and all else by AdamW."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert closure is None
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)

        def _move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] = state.get("step", torch.tensor(0.0)) + 1
            gradient = parameter.grad.float()  # type: ignore[union-attr]
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            mean = state["exp_avg"].mul_(optim.beta1).add_(gradient, alpha=1 - optim.beta1)
            if is_matrix(parameter):
                # Nesterov's: the momentum that the next step would begin with.
                ahead = gradient.lerp(mean, optim.beta1)
                rate = group["lr"] * _ADAM_SCALE * max(parameter.shape[-2:]) ** 0.5
                parameter.add_(orthogonalised(ahead).to(parameter.dtype), alpha=-rate)
                return
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            square = state["exp_avg_sq"].mul_(optim.beta2)
            square.addcmul_(gradient, gradient, value=1 - optim.beta2)
            count = float(state["step"])
            root = (square / (1 - optim.beta2**count)).sqrt_().add_(optim.eps)
            update = mean / (1 - optim.beta1**count) / root
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    return Muon(groups, {})


METHOD = Optimizer(
    name="muon",
    formula="orthogonalised momentum of each matrix (experts': each expert's), AdamW for the rest",
    source="Jordan 2024, arXiv 2502.16982",
    moments=("exp_avg", "exp_avg_sq"),
    matrix_moments=("exp_avg",),
    make=make,
    whole=True,
)
