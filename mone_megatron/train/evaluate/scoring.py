"""Log-likelihoods of tokens under the model that is being trained, in any layout.

Shape suffixes: B microbatch, S positions, V vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.parallel.device import Device
from mone_megatron.train.state import TrainingState

# Columns of the table of results.
_LOG, _GREEDY = range(2)


def token_scores(
    logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of labels, and whether each is the most likely token.

    Args:
        logits_BSV: of this rank's part of the padded vocabulary.
        labels_BS: int64.
        vocab_size: of the true vocabulary, over all ranks; columns from there on do not count.
        group: the tensor-parallel ranks. Collective.

    Returns:
        fp32 ``[B, S]`` and bool ``[B, S]``, the same on every rank of the group. Of equally likely
        tokens the one with the lowest id is the most likely.
    """
    columns = logits_BSV.shape[-1]
    first = dist.get_rank(group) * columns
    inside = max(0, min(columns, vocab_size - first))
    logits_BSV = logits_BSV[..., :inside].float()
    if inside:
        largest_BS, best_BS = logits_BSV.max(dim=-1)
        best_BS = best_BS + first
    else:
        # Only padding here.
        largest_BS = torch.full(labels_BS.shape, -torch.inf, device=labels_BS.device)
        best_BS = torch.full_like(labels_BS, vocab_size)
    overall_BS = largest_BS.clone()
    dist.all_reduce(overall_BS, dist.ReduceOp.MAX, group=group)
    best_BS = torch.where(largest_BS == overall_BS, best_BS, vocab_size)
    dist.all_reduce(best_BS, dist.ReduceOp.MIN, group=group)
    here_BS = (labels_BS >= first) & (labels_BS < first + inside)
    if inside:
        local_BS = torch.where(here_BS, labels_BS - first, 0)
        chosen_BS = logits_BSV.gather(-1, local_BS[..., None]).squeeze(-1) - overall_BS
        sums_BS = (logits_BSV - overall_BS[..., None]).exp().sum(dim=-1)
    else:
        chosen_BS = sums_BS = torch.zeros_like(overall_BS)
    both = torch.stack([torch.where(here_BS, chosen_BS, 0.0), sums_BS])
    dist.all_reduce(both, group=group)
    return both[0] - both[1].log(), best_BS == labels_BS


class Scorer:
    """Scores requests on all ranks together; each call is collective over all of them."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        device: Device,
        state: TrainingState,
        vocab_size: int,
        progress: Callable[[str], None],
    ) -> None:
        """Uses the model of ``state``.

        Args:
            config: validated.
            layout: from validation.
            device: where to compute.
            state: this rank's part.
            vocab_size: the tokenizer's, unpadded.
            progress: is told, on every rank, what was done.
        """
        self.config = config
        self.layout = layout
        self.device = device
        self.chunks = state.chunks
        self.vocab_size = vocab_size
        self.progress = progress
        self.forward_backward = get_forward_backward_func()
        # Enough to fill a pipeline, and what the interleaved schedule asks for.
        self.microbatches = config.parallel.pipeline
        self.rows = config.train.micro_batch_size

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        """Returns each request's log-likelihood of its scored tokens, and if they are greedy ones.

        The model is left in training mode.

        Args:
            requests: the same on every rank; each of at most ``train.seq_length`` + 1 tokens.
        """
        table = torch.zeros(len(requests), 2, dtype=torch.float64)
        # Long ones first, and those of like length together.
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].tokens))
        at_once = self.rows * self.layout.data * self.microbatches
        for chunk in self.chunks:
            chunk.eval()
        for start in range(0, len(order), at_once):
            self._score_some(requests, order[start : start + at_once], table)
            self.progress(f"scored {min(start + at_once, len(order))} of {len(order)} requests")
        for chunk in self.chunks:
            chunk.train()
        # Every request was scored by one rank; all get to know.
        on_device = table.to(self.device.torch_device)
        dist.all_reduce(on_device)
        return [(float(row[_LOG]), bool(row[_GREEDY])) for row in on_device.cpu()]

    def _score_some(
        self, requests: Sequence[ScoreRequest], places: Sequence[int], table: Tensor
    ) -> None:
        """Calls the schedule once. All ranks compute on tensors of one shape."""
        longest = len(requests[places[0]].tokens) - 1
        tensor = self.config.parallel.tensor
        length = -(-longest // tensor) * tensor
        mine = [
            list(self._places_of(places, microbatch)) for microbatch in range(self.microbatches)
        ]
        batches = [self._batch(requests, rows, length) for rows in mine]
        iterators = [iter(batches) for _ in self.chunks]
        outputs: list[tuple[Tensor, Tensor]] = self.forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=self.rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs or parallel_state.get_tensor_model_parallel_rank() > 0:
            return
        for rows, (logs_BS, greedy_BS) in zip(mine, outputs, strict=True):
            for row, place in enumerate(rows):
                request = requests[place]
                end = len(request.tokens) - 1
                scored = slice(end - request.scored, end)
                table[place, _LOG] = logs_BS[row, scored].sum(dtype=torch.float64)
                table[place, _GREEDY] = greedy_BS[row, scored].all()

    def _places_of(self, places: Sequence[int], microbatch: int) -> Iterator[int]:
        """Yields the places of what this data-parallel rank scores in one microbatch."""
        rank = parallel_state.get_data_parallel_rank()
        first = (microbatch * self.layout.data + rank) * self.rows
        yield from places[first : first + self.rows]

    def _batch(
        self, requests: Sequence[ScoreRequest], rows: Sequence[int], length: int
    ) -> tuple[Tensor, Tensor]:
        """Returns tokens and labels ``[B, S]``, filled up with token 0 behind and below."""
        both = torch.zeros(2, self.rows, length, dtype=torch.int64)
        for row, place in enumerate(rows):
            tokens = torch.tensor(requests[place].tokens)
            both[0, row, : len(tokens) - 1] = tokens[:-1]
            both[1, row, : len(tokens) - 1] = tokens[1:]
        tokens_BS, labels_BS = both.to(self.device.torch_device)
        return tokens_BS, labels_BS

    def _forward_step(
        self, batches: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor]]]:
        tokens_BS, labels_BS = next(batches)
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        output = model(tokens_BS, positions_BS.expand_as(tokens_BS), attention_mask=None)

        def scores(logits_BSV: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor]:
            group = parallel_state.get_tensor_model_parallel_group()
            return token_scores(logits_BSV, labels_BS, self.vocab_size, group)

        return output, scores
