"""Selects the neurons that a row keeps: the training package's own functions, on vLLM's tensors.

Shape suffixes: T rows (a token once for each of its experts), F neurons of an expert on this rank,
E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from mone_vllm.definition.kernels import reference
from mone_vllm.definition.methods.activations import ACTIVATIONS
from mone_vllm.definition.methods.rule import Budget, Rows, Rule
from mone_vllm.definition.methods.rules import RULES
from mone_vllm.definition.methods.score import Score
from mone_vllm.definition.methods.scores import SCORES

TARGETS = ("routed", "shared", "dense")


def activation_of(hidden_act: str) -> Callable[[Tensor], Tensor]:
    """Returns a as a function of g: ours, which kernels know, else transformers'."""
    if hidden_act in ACTIVATIONS and ACTIVATIONS[hidden_act].up is None:
        return ACTIVATIONS[hidden_act].function
    activate: Callable[[Tensor], Tensor] = ACT2FN[hidden_act]
    return activate


def on_triton(tensor: Tensor) -> bool:
    """Returns whether Triton kernels compute with a tensor; Triton comes with vLLM for CUDA."""
    return tensor.is_cuda


def topk_mask(values_TF: Tensor, k: int) -> Tensor:
    """Returns the mask of the k largest of each row: on CUDA by the kernel that training uses."""
    if on_triton(values_TF):
        from mone_vllm.definition.kernels import fused

        # Scores of other dtypes become fp32.
        dtype = torch.bfloat16 if values_TF.dtype is torch.bfloat16 else torch.float32
        if values_TF.shape[-1] <= fused.MOST_NEURONS[dtype]:
            return fused.topk_mask(values_TF, k)
    return reference.topk_mask(values_TF, k)


class Ranks(Protocol):
    """Describes the ranks that each hold a slice of every expert, in the order of the neurons."""

    @property
    def rank(self) -> int:
        """Returns this rank's place among them."""

    @property
    def size(self) -> int:
        """Returns how many ranks there are."""

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks. Collective."""

    def gather(self, part_TF: Tensor) -> Tensor:
        """Returns all ranks' columns side by side, ``[T, ranks * F]``. Collective."""


@dataclass(frozen=True)
class Selection:
    """Describes ``config.mone`` for the MLPs of one width.

    Attributes:
        score: what ranks neurons.
        rule: which of them are kept.
        budget: how many, of the whole expert.
        activate: a as a function of g.
        ranks: those that share the neurons; None when there is this one alone.
    """

    score: Score
    rule: Rule
    budget: Budget
    activate: Callable[[Tensor], Tensor]
    ranks: Ranks | None = None

    @classmethod
    def of(
        cls,
        mone: Mapping[str, Any] | None,
        target: str,
        neurons: int,
        activate: Callable[[Tensor], Tensor],
        ranks: Ranks | None,
    ) -> Selection | None:
        """Returns the selection in one kind of MLP; None where all neurons are kept.

        Args:
            mone: ``config.mone``.
            target: one of :data:`TARGETS`.
            neurons: f, of the whole MLP.
            activate: a as a function of g.
            ranks: those that share the neurons.

        Raises:
            ValueError: a setting is unknown, or is computed otherwise than here.
        """
        if not mone:
            return None
        known = {"keep_ratio", "score", "apply_to", "rule", "rule_options"}
        if unknown := sorted(set(mone) - known):
            raise ValueError(
                f"config.mone.{unknown[0]}: unknown to this mone-vllm; install the one of the "
                "version that exported the model"
            )
        if target not in mone.get("apply_to", ("routed",)):
            return None
        rule = RULES[mone.get("rule", "topk")]
        budget = rule.budget(mone["keep_ratio"], neurons, mone.get("rule_options"))
        chosen = cls(SCORES[mone.get("score", "abs_activation")], rule, budget, activate, ranks)
        if not rule.causal:
            raise ValueError(
                f"mone.rule: {rule.name} looks at other tokens of the batch; a server batches "
                "tokens of other people"
            )
        if problem := rule.shard_problem(budget, 1 if ranks is None else ranks.size):
            raise ValueError(
                f"{target} MLPs: {problem}; use --tensor-parallel-size 1 (or, where routed experts "
                "alone select, --enable-expert-parallel)"
            )
        if rule.pools and target == "routed":
            raise ValueError(
                f"mone.rule: {rule.name} ranks the neurons of all experts of a token together, and "
                "vLLM's experts do not say which token a row is of"
            )
        # As transformers computes the export: all of them, whatever the rule.
        return None if budget.kept == neurons else chosen

    def initial_state(self, num_experts: int) -> dict[str, Tensor]:
        """Returns the rule's state before an export's is loaded, fp32 ``[E]`` each."""
        return {name: torch.full((num_experts,), value) for name, value in self.rule.state.items()}

    @property
    def reads_down_norm(self) -> bool:
        """Returns whether the score reads the norm of each neuron's row of the down projection."""
        return "down_norm" in self.score.reads

    @property
    def is_top_k(self) -> bool:
        """Returns whether each row keeps exactly its K best neurons, all of them on this rank."""
        return self.rule.top_k and self.ranks is None

    def scores(self, gate_TF: Tensor, up_TF: Tensor, down_norm_TF: Tensor | None) -> Tensor:
        """Returns what ranks the neurons of this rank, ``[T, F]``."""
        return self.score.of(
            gate_TF=gate_TF, up_TF=up_TF, activate=self.activate, down_norm_TF=down_norm_TF
        )

    def mask(
        self,
        gate_TF: Tensor,
        up_TF: Tensor,
        *,
        down_norm_TF: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
        expert_T: Tensor | None = None,
        num_experts: int = 1,
    ) -> Tensor:
        """Returns True at the neurons of this rank that each row keeps, of all neurons.

        Args:
            gate_TF: gate projections.
            up_TF: up projections.
            down_norm_TF: for scores that read it.
            state: the rule's, ``[E]`` each.
            expert_T: int64, the expert on this rank of each row; None for an MLP alone.
            num_experts: E.
        """
        scores_TF = self.scores(gate_TF, up_TF, down_norm_TF)
        if expert_T is None:
            expert_T = torch.zeros(len(scores_TF), dtype=torch.int64, device=scores_TF.device)
        return self.rule.mask(
            Rows(
                scores_TF=scores_TF,
                budget=self.budget,
                largest_of=self._largest,
                expert_T=expert_T,
                num_experts=num_experts,
                state=state or {},
                shards=self.ranks,
            )
        )

    def _largest(self, values_TF: Tensor, k: int) -> Tensor:
        """Returns this rank's columns of the mask of the k largest values of each row."""
        if self.ranks is None:
            return topk_mask(values_TF, k)
        width = values_TF.shape[-1]
        mask_TF = topk_mask(self.ranks.gather(values_TF), k)
        return mask_TF.narrow(-1, self.ranks.rank * width, width)

    def hidden(self, gate_up: Tensor, **rows: Any) -> Tensor:
        """Returns the input of the down projection, ``[T, F]``, of gate and up ``[T, 2 F]``.

        On CUDA the kernel of training computes it in one pass, and selects while it does where the
        rule is top-k; other rules and scores give it their mask.

        Args:
            gate_up: gate and up projections side by side.
            rows: as for :meth:`mask`.
        """
        gate_TF, up_TF = gate_up.chunk(2, dim=-1)
        if on_triton(gate_TF):
            from mone_vllm.definition.kernels import fused

            if fused.supports(gate_TF, up_TF, self.activate):
                keep: Tensor | reference.TopK
                if self.is_top_k and not self.reads_down_norm:
                    keep = reference.TopK(self.budget.kept, self.score.name)
                else:
                    keep = self.mask(gate_TF, up_TF, **rows)
                return fused.fused_glu(
                    gate_TF, up_TF, None, keep, activate=self.activate, packed=None, sums=None
                )[0]
        return self.activate(gate_TF) * up_TF * self.mask(gate_TF, up_TF, **rows)
