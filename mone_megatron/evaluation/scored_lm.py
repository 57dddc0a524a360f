"""Defines a model of lm-evaluation-harness on top of anything that can score tokens.

Text becomes tokens as in :func:`mone_megatron.evaluation.evaluate.harness_model`, so that the same
weights get the same scores, whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from transformers import AutoTokenizer

from mone_megatron.data.framing import Framing
from mone_megatron.evaluation.harness_tokens import fitted, rolling_windows
from mone_megatron.evaluation.requests import ScoreRequest
from mone_megatron.hf.text_format import follow, framing_of_folder

Scores = list[tuple[float, bool]]


class ScoredLM(TemplateLM):
    """Answers log-likelihood requests of the harness; does not write text."""

    def __init__(
        self,
        tokenizer_dir: Path,
        *,
        max_length: int,
        score: Callable[[Sequence[ScoreRequest]], Scores],
        framing: Framing | None = None,
    ) -> None:
        """Loads the tokenizer; ``score`` computes the answers.

        Args:
            tokenizer_dir: folder of the model's tokenizer.
            max_length: tokens that the model reads at most.
            score: returns the log-likelihood of each request's continuation in nats, and whether it
                is the greedy one.
            framing: the special tokens around documents; None follows the tokenizer's own template.

        Raises:
            ValueError: the tokenizer names no token that ends a document.
        """
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
        self.max_length = max_length
        self._score = score
        if framing is None:
            framing = framing_of_folder(
                tokenizer_dir, self.tokenizer.backend_tokenizer, self.tokenizer.eos_token_id
            )
        if framing.eod is None:
            raise ValueError(
                f"{tokenizer_dir}: names no eos_token; add it to tokenizer_config.json"
            )
        follow(self.tokenizer, framing)
        self._framing = framing

    @property
    def eot_token_id(self) -> int:
        """Returns the id of the token that ends a text."""
        return self._framing.end

    @property
    def prefix_token_id(self) -> int:
        """Returns the id of the token that a text without context follows."""
        return self._framing.context[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns a text's tokens; a special first token that it has already is not added again."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begin = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, begin):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> Scores:
        fit = [
            fitted(context, wanted, self._framing, self.max_length)
            for _, context, wanted in requests
        ]
        return self._score(
            [ScoreRequest([*context, *wanted], len(wanted)) for context, wanted in fit]
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns what the harness's does, without a bar: who scores shows how far it is."""
        scores: Scores = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns texts' log-likelihoods, in windows that share one token or begin with a BOS."""
        windows: list[ScoreRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            if self._framing.opening:
                pairs = rolling_windows(ids, self._framing.opening, self.max_length)
            else:
                pairs = [
                    utils.make_disjoint_window(pair)
                    for pair in utils.get_rolling_token_windows(
                        token_list=ids,
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    )
                ]
            for context, wanted in pairs:
                windows.append(ScoreRequest([*context, *wanted], len(wanted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises NotImplementedError; tasks that write text are refused before they run."""
        raise NotImplementedError("tasks during training score text and do not write it")
