"""Selects neurons when several ranks hold parts of the same expert or MLP.

transformers' tensor parallelism splits neurons: each rank computes some of them and the down
projection's results are summed. The neurons of a token are ranked over all ranks that share them,
so that exactly the same are kept as on one device, ties included.

This file is copied into exported models: of ours it imports the definition of the selection only.

Shape suffixes: T rows, F neurons of this rank, K kept neurons, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mone_megatron.kernels.reference import topk_mask


@dataclass(frozen=True)
class Neurons:
    """Describes the neurons of one expert or MLP: how many, and which ranks compute them.

    Attributes:
        owner: whose they are, for errors.
        count: how many all ranks have together.
        mesh: the devices that share them, each a slice in the order of ranks; None for this one
            alone. (A mesh rather than a process group: models that hold it can be copied.)
        dim: which dimension of the mesh lies along the neurons.
    """

    owner: str
    count: int
    mesh: DeviceMesh | None = None
    dim: int = 0

    @classmethod
    def of(cls, owner: str, count: int, weight: Tensor, neuron_dim: int) -> Neurons:
        """Returns the neurons of a weight, which says itself how it is spread over ranks.

        Args:
            owner: whose they are.
            count: how many there are, read where the weight does not say more.
            weight: a parameter as its module holds it between forward passes.
            neuron_dim: its axis of neurons.

        Raises:
            ValueError: they are spread along two dimensions of the mesh.
        """
        if not isinstance(weight, DTensor):
            return cls(owner, count)
        axis, mesh = neuron_dim % weight.ndim, weight.device_mesh
        along = [
            dim
            for dim, placement in enumerate(weight.placements)
            if getattr(placement, "dim", None) == axis and mesh.size(dim) > 1
        ]
        if len(along) > 1:
            raise ValueError(
                f"{owner}: its neurons are split along two dimensions of the device mesh, over "
                "which they cannot be ranked; split them along one (tp_size)"
            )
        return cls(owner, int(weight.shape[axis]), mesh, along[0]) if along else cls(owner, count)

    def widths(self) -> list[int]:
        """Returns how many neurons each rank computes, as torch shards a dimension."""
        most = -(-self.count // self.size)
        return [min(max(self.count - rank * most, 0), most) for rank in range(self.size)]

    @property
    def rank(self) -> int:
        """Returns this rank's place among those that share the neurons; 0 for one alone."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(self.dim)

    @property
    def size(self) -> int:
        """Returns how many ranks share the neurons; 1 where they are not split."""
        return 1 if self.mesh is None else self.mesh.size(self.dim)

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks that share the neurons. Collective."""
        total = part.clone()
        if self.mesh is not None:
            dist.all_reduce(total, group=self.mesh.get_group(self.dim))
        return total

    def in_groups(self, size: int) -> Neurons:
        """Returns groups of ``size`` adjacent neurons, each wholly on a rank, as if neurons."""
        return replace(self, count=self.count // size)

    def topk_mask(self, scores_TF: Tensor, kept: int) -> Tensor:
        """Returns True at this rank's neurons among the ``kept`` best, ties to the lowest index.

        It is :func:`topk_mask` of all ranks' scores side by side, of which this rank has its
        columns: each rank shows the others its ``kept`` best, among which the best of all must be.

        Args:
            scores_TF: this rank's scores, ``[..., F]``; the same rows on all ranks.
            kept: K.

        Raises:
            ValueError: these are not all neurons, and it is not known who has the others.
        """
        widths, here, rank = self.widths(), scores_TF.shape[-1], self.rank
        if widths[rank] != here:
            raise ValueError(
                f"{self.owner}: {here} of its {self.count} neurons are computed here, where "
                f"{widths[rank]} are expected. Something splits them over ranks without saying "
                "how, so they cannot be ranked; load the model by from_pretrained with "
                "transformers' own parallelism (distributed_config), or unsplit"
            )
        if self.mesh is None:
            return topk_mask(scores_TF, kept)
        if 0 in scores_TF.shape[:-1]:
            return torch.zeros_like(scores_TF, dtype=torch.bool)
        rows_TF = scores_TF.reshape(-1, here)
        shown = [min(kept, width) for width in widths]
        # Places that no neuron fills rank last, and never count as tied.
        mine_TK = rows_TF.new_full((len(rows_TF), kept), -torch.inf)
        mine_TK[:, : shown[rank]] = rows_TF.topk(shown[rank], dim=-1).values
        everyone = [torch.empty_like(mine_TK) for _ in widths]
        dist.all_gather(everyone, mine_TK, group=self.mesh.get_group(self.dim))
        everyone_RTK = torch.stack(everyone)
        # A NaN is among the largest to topk, and amin passes it on: nothing compares with it.
        best_TK = everyone_RTK.transpose(0, 1).flatten(1).topk(kept, dim=-1, sorted=False).values
        kth_T1 = best_TK.amin(dim=-1, keepdim=True)
        places_K = torch.arange(kept, device=rows_TF.device)
        filled_R1K = places_K < torch.tensor(shown, device=rows_TF.device).view(-1, 1, 1)
        above_T = (everyone_RTK > kth_T1).sum(dim=(0, 2))
        tied_RT = ((everyone_RTK == kth_T1) & filled_R1K).sum(dim=2)
        # A rank that cannot show all its ties leaves no room for the ranks after it.
        room_T1 = (kept - above_T - tied_RT[:rank].sum(dim=0)).unsqueeze(-1)
        tied_TF = rows_TF == kth_T1
        mask_TF = (rows_TF > kth_T1) | (tied_TF & (tied_TF.cumsum(dim=-1) <= room_T1))
        return mask_TF.view(scores_TF.shape)
