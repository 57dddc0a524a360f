"""Has attention run as CUDA graphs: megatron-core's, made by Transformer Engine. Not run here.

``megatron.transformer.cuda_graph_impl=transformer_engine`` asks for them. megatron-core's layers
know how to make a graph of their first half (norm, attention, residual) and how to go on from
it with the other; its trainer, which is not part of megatron-core, makes the graphs between two
steps. That part is here. Experts never are in a graph: they get other numbers of rows in each step.

A graph repeats kernels on the memory that they had. What it would leave out or read in the wrong
place is refused by its key (:mod:`mone_megatron.config.checks.cuda_graphs`) where a configuration
can say it, and looked for before each step where code can do it: weights that have moved, and
hooks on modules that are not called any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import is_te_min_version
from torch import nn

from mone_megatron.config.layout import Layout
from mone_megatron.config.megatron import GRAPHS
from mone_megatron.config.schema import Config

_KEY = f"megatron.transformer.{GRAPHS}"
# The first that leaves weights out of a graph that it does not use: those of experts have no
# gradient in attention's, and would be reduced without their own.
_OLDEST = "2.7.0"


class AttentionGraphs:
    """Makes graphs of the attention of all layers of a rank once a few steps were taken.

    Evaluation runs without them: megatron-core's layers use a graph in training only.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        transformer: TransformerConfig,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        """Finds the layers, and makes no graph yet.

        Args:
            config: validated, with ``cuda_graph_impl=transformer_engine``.
            layout: from validation.
            transformer: megatron-core's configuration of the model.
            chunks: this rank's part of the model.
            optimizer: whose gradients are cleared when the graphs are made.

        Raises:
            ValueError: when the installed Transformer Engine, or the environment, cannot make them.
        """
        if not is_te_min_version(_OLDEST):
            raise ValueError(f"{_KEY}: Transformer Engine {_OLDEST} or later makes the graphs")
        train = config.train
        try:
            self._helper = TECudaGraphHelper(
                model=list(chunks),
                config=transformer,
                seq_length=train.seq_length,
                micro_batch_size=train.micro_batch_size,
                optimizers=[optimizer],
            )
        except AssertionError as error:
            raise ValueError(f"{_KEY}: {error}") from error
        self._chunks = chunks
        self._warm_up = transformer.cuda_graph_warmup_steps
        self._sizes = train.global_batch_size, train.micro_batch_size, layout.data
        self._steps = 0
        self._weights: list[tuple[nn.Parameter, int]] = []

    @property
    def layers(self) -> list[TransformerLayer]:
        """Returns the layers whose attention is to run as a graph, or does."""
        return list(self._helper.flattened_callables)

    def before_step(self) -> None:
        """Makes the graphs once the steps to warm up were taken, and looks after them later.

        To be called before each step of training, when gradients are not needed any more.

        Raises:
            RuntimeError: when a graph would read weights where they are not any more, or leave out
                a hook.
        """
        if self._steps == self._warm_up:
            self._make()
        elif self._steps > self._warm_up:
            self._look()
        self._steps += 1

    def drop(self) -> None:
        """Drops the graphs, if they were made; process groups that are in one cannot be closed."""
        if self._weights:
            self._helper.delete_cuda_graphs()
            self._weights = []

    def _make(self) -> None:
        self._refuse_hooks()
        with self._without_gathering_hooks(), self._microbatches_counted():
            self._helper.create_cudagraphs()
        if self._gathers:
            # The hooks of modules are not called in a graph: their layer calls them before.
            self._helper.cuda_graph_set_manual_hooks()
        self._weights = [
            (weight, weight.data_ptr())
            for module in self._modules()
            for weight in module.parameters(recurse=False)
        ]

    def _look(self) -> None:
        if any(weight.data_ptr() != place for weight, place in self._weights):
            raise RuntimeError(
                f"{_KEY}: weights of attention have moved in memory since the graphs were made, "
                "and the graphs would go on with the old ones; leave it out"
            )
        self._refuse_hooks()

    def _refuse_hooks(self) -> None:
        """Refuses hooks on modules that are not called: but those of the wrapper, one for each."""
        for module in (*self.layers, *self._modules()):
            if (
                module._forward_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or len(module._forward_pre_hooks) > self._gathers
            ):
                raise RuntimeError(
                    f"{_KEY}: a hook on {type(module).__name__} would not be called, since its "
                    "layer's attention is a CUDA graph; take it away, or leave the graphs out"
                )

    @property
    def _gathers(self) -> bool:
        """Whether weights are gathered when a module needs them, which its hook waits for."""
        gathers: bool = self._chunks[0].use_forward_hook
        return gathers

    def _modules(self) -> Iterator[nn.Module]:
        """Yields every module that a graph runs."""
        for layer in self.layers:
            for part in layer._get_submodules_under_cudagraphs():
                yield from part.modules()

    @contextmanager
    def _without_gathering_hooks(self) -> Iterator[None]:
        """Takes the hooks away that gather weights: a capture cannot wait for another stream."""
        if not self._gathers:
            yield
            return
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
        try:
            yield
        finally:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()

    @contextmanager
    def _microbatches_counted(self) -> Iterator[None]:
        """Tells megatron-core how many microbatches a step has, by the global that it asks."""
        global_batch, micro_batch, data = self._sizes
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=dist.get_rank(),
            rampup_batch_size=None,
            global_batch_size=global_batch,
            micro_batch_size=micro_batch,
            data_parallel_size=data,
        )
        try:
            yield
        finally:
            num_microbatches_calculator.destroy_num_microbatches_calculator()


def describe(config: Config) -> str:
    """Returns in one line what runs as graphs, for people."""
    default = TransformerConfig.cuda_graph_warmup_steps
    steps = config.megatron.transformer.get("cuda_graph_warmup_steps", default)
    return (
        f"CUDA graphs: attention of every layer, made after {steps} steps of this run ({_KEY}; not "
        "run where this was developed); norms before MLPs, routers, experts and evaluation run "
        "without"
    )
