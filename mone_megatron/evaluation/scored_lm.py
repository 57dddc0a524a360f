"""A model of lm-evaluation-harness on top of anything that can score tokens.

Text becomes tokens as in the harness's own class for models of transformers, so that the same
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

from mone_megatron.evaluation.requests import ScoreRequest

Scores = list[tuple[float, bool]]


class ScoredLM(TemplateLM):
    """Answers log-likelihood requests; does not write text."""

    def __init__(
        self,
        tokenizer_dir: Path,
        *,
        max_length: int,
        score: Callable[[Sequence[ScoreRequest]], Scores],
    ) -> None:
        """Score through ``score``.

        Args:
            tokenizer_dir: folder of the model's tokenizer.
            max_length: tokens that the model reads at most.
            score: log-likelihood of each request's continuation, and whether it is the greedy one.

        Raises:
            ValueError: the tokenizer names no token to begin with.
        """
        super().__init__()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_dir)
        self.max_length = max_length
        self._score = score
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if begin is None and end is None:
            raise ValueError(
                f"{tokenizer_dir}: names no eos_token; add it to tokenizer_config.json"
            )
        self._begin, self._end = (end if begin is None else begin), end

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return int(self._end)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return int(self._begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; a special first token that it has already is not added again."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begin = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, begin):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> Scores:
        return self._score(
            [
                # What is too long loses its beginning.
                ScoreRequest((context + wanted)[-self.max_length - 1 :], len(wanted))
                for _, context, wanted in requests
            ]
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As the harness's, without a bar: who scores shows how far it is."""
        scores: Scores = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that share one token."""
        windows: list[ScoreRequest] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, wanted = utils.make_disjoint_window(pair)
                windows.append(ScoreRequest([*context, *wanted], len(wanted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refused when tasks are loaded."""
        raise NotImplementedError("tasks during training score text and do not write it")
