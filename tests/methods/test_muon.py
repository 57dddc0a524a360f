"""Muon moves every matrix by itself, those of experts too, and needs them whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.methods.optimizers.muon import is_matrix, make, orthogonalised


@dataclass(frozen=True)
class Optim:
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


def moved(*shapes: tuple[int, ...], steps: int = 3) -> list[torch.Tensor]:
    """Parameters after some steps on gradients that do not depend on how they are stacked."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = make([{"params": parameters, "lr": 0.1, "weight_decay": 0.01}], Optim())
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 4, 9), (2, 2, 9, 4)])
def test_singular_values_are_near_1_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    # Between the singular vectors of the input it is diagonal.
    inside = left.mT @ found @ right.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 2, 4, 6)])
def test_experts_are_moved_one_by_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    flat = matrices.view(-1, *shape[-2:])
    alone = torch.stack([orthogonalised(matrix) for matrix in flat]).view(shape)
    torch.testing.assert_close(orthogonalised(matrices), alone, rtol=1e-5, atol=1e-6)
    # Not one matrix of all experts under one another.
    together = orthogonalised(matrices.flatten(0, -2)).view(shape)
    assert (together - alone).abs().max() > 0.1


def test_vectors_and_tables_of_tokens_go_by_adam() -> None:
    vector, matrix = moved((5,), (5, 5))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, generator=generator), torch.randn(5, 5, generator=generator)]
    reference = torch.nn.Parameter(start[0].clone())
    adam = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
    for _ in range(3):
        reference.grad = torch.randn(5, generator=generator)
        torch.randn(5, 5, generator=generator)
        adam.step()
    torch.testing.assert_close(vector, reference.detach(), rtol=1e-5, atol=1e-6)
    # An update of a matrix has the size of Adam's: about lr an element.
    step = (matrix - start[1]).square().mean().sqrt()
    assert 0.02 < step < 0.6
    table = torch.nn.Parameter(torch.zeros(4, 4))
    assert is_matrix(table)
    table.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
    assert not is_matrix(table)
    assert is_matrix(torch.zeros(2, 2, 3, 4))
    assert not is_matrix(torch.zeros(7))


@pytest.mark.parametrize(
    ("overrides", "processes", "says"),
    [
        ((), 1, "use parallel.distributed_optimizer=false"),
        (("parallel.distributed_optimizer=false", "parallel.tensor=2",
          "parallel.expert=2"), 2, "use parallel.tensor=1"),
        (("parallel.distributed_optimizer=false", "parallel.expert_tensor=2"), 2,
         "use parallel.expert_tensor=1"),
    ],
)  # fmt: skip
def test_cut_matrices_are_refused(overrides: tuple[str, ...], processes: int, says: str) -> None:
    config = compose(["experiment=tiny_mone", "device=cpu", "optim.name=muon", *overrides])
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size=processes)
    (line,) = caught.value.problems
    assert line.startswith("optim.name: muon needs whole matrices")
    assert says in line
