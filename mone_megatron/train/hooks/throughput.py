"""How fast a step was: tokens and floating-point operations a second."""

from __future__ import annotations

from dataclasses import replace

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.planning.flops import Flops, flops_per_step


class ThroughputHook(Hook):
    """Records tokens a second, and TFLOP/s of one process (docs/metrics.md)."""

    def __init__(self, config: Config, layout: Layout, vocab_size: int) -> None:
        """Counts the operations of a step at the final keep ratio.

        Args:
            config: validated.
            layout: from validation.
            vocab_size: the tokenizer's, unpadded.
        """
        self.config = config
        self.world_size = layout.world_size
        self.vocab_size = vocab_size
        self.tokens = config.train.global_batch_size * config.train.seq_length
        self.flops = flops_per_step(config, vocab_size)

    def record(self, report: StepReport) -> Record:
        """Returns the rates of the step."""
        flops = self._flops_at(report.step)
        rate = 1e-12 / report.seconds / self.world_size
        return {
            "tokens_per_second": self.tokens / report.seconds,
            "step_seconds": report.seconds,
            "tflops_realised": flops.realised * rate,
            "tflops_ideal": flops.ideal * rate,
        }

    def _flops_at(self, step: int) -> Flops:
        mone = self.config.mone
        ratio = mone.keep_ratio_at(step)
        if ratio == mone.keep_ratio:
            return self.flops
        at_step = replace(self.config, mone=replace(mone, keep_ratio=ratio))
        return flops_per_step(at_step, self.vocab_size)
