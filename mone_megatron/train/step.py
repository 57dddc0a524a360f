"""One training step and one evaluation, through megatron-core's schedules.

Shape suffixes: B microbatch, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, clip_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.profiler import record_function

from mone_megatron.config.layout import Layout
from mone_megatron.config.megatron import graphs_attention
from mone_megatron.config.schema import Config
from mone_megatron.data.loader import DOCUMENTS
from mone_megatron.mone.selection import NeuronSelector
from mone_megatron.parallel.cuda_graphs import AttentionGraphs
from mone_megatron.parallel.device import Device
from mone_megatron.parallel.megatron_compat.auxiliary_losses import scale_layer_losses
from mone_megatron.parallel.megatron_compat.context_parts import part_of_context_rank
from mone_megatron.parallel.megatron_compat.gradient_norm import clipped_together, norms_apart
from mone_megatron.train.resume.saved_state import parameter_states
from mone_megatron.train.state import TrainingState

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
# Gives the tensors that are to be summed over ranks with the loss, by name.
Reduce = Callable[[], Mapping[Any, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """Holds what one step gives, equal on every rank.

    Attributes:
        loss: mean next-token cross-entropy over the global batch, in nats.
        grad_norm: the norm of all gradients before clipping; NaN when the loss was refused before.
        lr: the learning rate of the step.
        sums: what ``reduce`` returned, summed over ranks, fp32 on the CPU.
        fault: why the update was not applied; None when it was.
    """

    loss: float
    grad_norm: float
    lr: float
    sums: dict[Any, Tensor]
    fault: str | None = None


def not_finite(loss: float) -> str | None:
    """Returns what is wrong with a loss that is NaN or infinite; None for another one."""
    return None if math.isfinite(loss) else f"the loss is {loss}"


def _forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, LossFunction]:
    batch = next(batches)
    losses_BS = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=batch.get(DOCUMENTS),
        labels=batch["labels"],
        # Multi-token prediction asks for it; the loss of the next token is masked below.
        loss_mask=batch["loss_mask"],
    )
    mask_BS = batch["loss_mask"]

    def mean_loss(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
        context_ranks = parallel_state.get_context_parallel_world_size()
        tokens = mask_BS.sum() * context_ranks
        loss = (losses_BS.float() * mask_BS).sum() / tokens
        return loss, loss.detach().clone()

    return losses_BS, mean_loss


def usual_rows(config: Config) -> int:
    """Returns the rows of a microbatch that a rank's experts get when experts are used evenly."""
    train = config.train
    tokens = train.micro_batch_size * train.seq_length // config.parallel.context
    return tokens * max(1, config.model.experts_per_token)


class Stepper:
    """Runs steps over the model chunks of this rank."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        device: Device,
        state: TrainingState,
    ) -> None:
        """Gives megatron-core its functions for finalising gradients and for overlap."""
        self.config = config
        self.layout = layout
        self.device = device
        self.chunks = chunks = state.chunks
        self.optimizer = optimizer = state.optimizer
        self.scheduler = state.scheduler
        self.forward_backward = get_forward_backward_func()
        transformer = get_model_config(chunks[0])
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in chunks]
            grad_sync = [chunk.start_grad_sync for chunk in chunks]
            transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
            transformer.grad_sync_func = grad_sync if len(chunks) > 1 else grad_sync[0]
        self.graphs = (
            AttentionGraphs(config, layout, transformer, chunks, optimizer)
            if graphs_attention(config.megatron)
            else None
        )
        # megatron-core moves them while it finalises gradients, before anything is judged.
        self._expert_biases = [
            module.expert_bias
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, TopKRouter) and module.expert_bias is not None
        ]
        self._selectors = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, NeuronSelector)
        ]

    def train(self, batches: Sequence[Batch], reduce: Reduce = dict) -> StepResult:
        """Takes one optimizer step; see :meth:`attempt`.

        Raises:
            FloatingPointError: when the loss or the gradient norm is not finite. The parameters
                are those of the step before.
        """
        result = self.attempt(batches, reduce)
        if result.fault is not None:
            raise FloatingPointError(result.fault)
        return result

    def attempt(
        self,
        batches: Sequence[Batch],
        reduce: Reduce = dict,
        judge: Callable[[float], str | None] = not_finite,
    ) -> StepResult:
        """Takes one optimizer step, which is applied only when nothing is wrong with it.

        A step that is not applied leaves parameters, masters, moments, expert biases and the state
        of selection rules bitwise as they were; the learning-rate schedule and random streams move
        on all the same.

        Args:
            batches: this rank's microbatches of the step, on the CPU.
            reduce: called after the backward passes; each tensor that it gives is summed over all
                ranks, in the same collective as the loss. Names and shapes are the same on all.
            judge: says what is wrong with the global loss, if anything. It is called on every rank
                with the same number and must say the same on each.
        """
        biases = [bias.clone() for bias in self._expert_biases]
        for chunk in self.chunks:
            chunk.train()
        if self.graphs is not None:
            self.graphs.before_step()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with record_function("step: forward and backward"):
            losses = self._run(batches, forward_only=False)
        loss, sums = self._loss_and_sums(losses, reduce())
        self.scheduler.step(1)
        fault, grad_norm = judge(loss), math.nan
        if fault is None:
            with record_function("step: optimizer"):
                grad_norm = self._update()
            if not math.isfinite(grad_norm):
                fault = f"the gradient norm is {grad_norm} (the loss is {loss:.6g})"
        if fault is not None:
            for bias, before in zip(self._expert_biases, biases, strict=True):
                bias.copy_(before)
        for selector in self._selectors:
            selector.advance(applied=fault is None)
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, sums=sums, fault=fault)

    def drop_graphs(self) -> None:
        """Drops CUDA graphs, if there are any, before process groups are closed."""
        if self.graphs is not None:
            self.graphs.drop()

    @torch.no_grad()
    def _update(self) -> float:
        """Takes the optimizer's step, unless the gradient norm, which is returned, is not finite.

        This is ``ChainedOptimizer.step`` with a look at the norm in the middle: megatron-core
        would apply a NaN. The norm is a sum over all ranks that hold different gradients, so all
        ranks see the same.
        """
        found_inf = self.optimizer.prepare_grads()
        assert not found_inf, "only loss scaling finds infinities here, and there is none"
        norms = {
            None: float(self.optimizer.get_grad_norm()),
            **norms_apart(self.optimizer, get_model_config(self.chunks[0])),
        }
        grad_norm = math.hypot(*norms.values()) if len(norms) > 1 else norms[None]
        if not math.isfinite(grad_norm):
            return grad_norm
        parts = (
            self.optimizer.chained_optimizers
            if isinstance(self.optimizer, ChainedOptimizer)
            else [self.optimizer]
        )
        for part in parts:
            for name, parameters in clipped_together(part.get_parameters()).items():
                clip_grads.clip_grad_by_total_norm_fp32(
                    parameters, part.config.clip_grad, norms[name]
                )
        updated = self.optimizer.step_with_ready_grads()
        assert updated
        return grad_norm

    @torch.no_grad()
    def state_is_finite(self) -> bool:
        """Returns whether every weight, master and moment on every rank is finite.

        Collective; reads them all.
        """
        kept = [tensor for chunk in self.chunks for tensor in chunk.parameters()]
        for state in parameter_states(self.optimizer):
            kept += [tensor for kind in state.kinds if (tensor := state.tensor(kind)) is not None]
        good = torch.stack([tensor.isfinite().all() for tensor in kept if tensor.numel()]).all()
        return float(self._sum_over_ranks((~good).float().view(1))[0]) == 0.0

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], steps: int) -> float:
        """Returns the mean loss over ``steps`` global batches, and leaves the model training."""
        for chunk in self.chunks:
            chunk.eval()
        total = 0.0
        for _ in range(steps):
            microbatches = [next(batches) for _ in range(self.layout.num_microbatches)]
            losses = self._run(microbatches, forward_only=True)
            total += float(self._sum_over_ranks(self._loss_share(losses))[0])
        for chunk in self.chunks:
            chunk.train()
        return total / steps

    def _run(self, batches: Sequence[Batch], *, forward_only: bool) -> list[Tensor]:
        on_device = [self._to_device(batch) for batch in batches]
        if self.config.model.num_experts == 0:
            # Dense layers select neurons, too, and have losses; the schedule forgets about those.
            scale_layer_losses(
                microbatches=len(batches), context_ranks=self.config.parallel.context
            )
        iterators = [iter(on_device) for _ in self.chunks]
        losses: list[Tensor] = self.forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.config.train.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=forward_only,
        )
        return losses

    def _to_device(self, batch: Batch) -> Batch:
        moved = {
            name: tensor.to(self.device.torch_device, non_blocking=True)
            for name, tensor in batch.items()
        }
        if self.config.parallel.context > 1:
            # Attention sees the keys of all ranks, and so the documents of all tokens.
            whole = {name: moved.pop(name) for name in (DOCUMENTS,) if name in moved}
            group = parallel_state.get_context_parallel_group()
            moved = part_of_context_rank(moved, group) | whole
        return moved

    def _loss_share(self, losses: list[Tensor]) -> Tensor:
        """Returns this rank's share of the global mean loss, ``[1]``; 0 where there is none."""
        if not losses:
            return torch.zeros(1, device=self.device.torch_device)
        # The last pipeline stage computes the loss, every tensor-parallel rank the same one.
        copies = self.layout.data * self.config.parallel.tensor
        return torch.stack(losses).sum().view(1) / (len(losses) * copies)

    def _loss_and_sums(
        self, losses: list[Tensor], values: Mapping[Any, Tensor]
    ) -> tuple[float, dict[Any, Tensor]]:
        """Returns the global loss, and each tensor of ``values`` summed over ranks."""
        device = self.device.torch_device
        parts = [self._loss_share(losses)]
        parts += [value.to(device, torch.float32).flatten() for value in values.values()]
        loss, *sums = self._sum_over_ranks(torch.cat(parts)).split([part.numel() for part in parts])
        return float(loss), {
            name: total.view(value.shape)
            for (name, value), total in zip(values.items(), sums, strict=True)
        }

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device.torch_device)
        dist.all_reduce(values)
        return values.cpu()
