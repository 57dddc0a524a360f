"""Scores texts by asking a server in OpenAI's protocol for logprobs of prompts, as vLLM does."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mone_megatron.evaluation.requests import ScoreRequest

# The server counts a token that it generates, and the last one, which is only predicted.
_MORE_TOKENS = 2
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class ServedModel:
    """Asks a model of a server how likely texts are.

    Attributes:
        url: the server's, such as ``http://127.0.0.1:8000``.
        name: the model's there.
        max_length: how many tokens it reads when it scores.
        batch_size: texts in one request.
    """

    url: str
    name: str
    max_length: int
    batch_size: int

    @classmethod
    def at(cls, url: str, *, batch_size: int) -> ServedModel:
        """Returns the model that a server has.

        Raises:
            ValueError: nothing answers there, or it has several models.
        """
        url = url.rstrip("/").removesuffix("/v1")
        models = _asked(f"{url}/v1/models")["data"]
        # Adapters have a parent.
        whole = [model for model in models if not model.get("parent")]
        if len(whole) != 1:
            names = ", ".join(model["id"] for model in whole)
            raise ValueError(f"--server: {url} has several models ({names}); serve one")
        length = whole[0].get("max_model_len")
        if length is None:
            raise ValueError(f"--server: {url} does not say how long its contexts are; use vLLM")
        return cls(url, whole[0]["id"], length - _MORE_TOKENS, batch_size)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood, and whether it is the greedy one."""
        scores: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc=self.name, unit="text") as bar:
            for first in range(0, len(requests), self.batch_size):
                batch = requests[first : first + self.batch_size]
                scores += self._batch(batch)
                bar.update(len(batch))
        return scores

    def _batch(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        answer = _asked(
            f"{self.url}/v1/completions",
            {
                "model": self.name,
                "prompt": [request.tokens for request in requests],
                "max_tokens": 1,
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
                # Tokens that look alike as text stay apart.
                "return_tokens_as_token_ids": True,
            },
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        scores = []
        for request, choice in zip(requests, choices, strict=True):
            found = choice["logprobs"]
            end = len(request.tokens)
            places = range(end - request.scored, end)
            own = [found["token_logprobs"][place] for place in places]
            best = [max(found["top_logprobs"][place].values()) for place in places]
            scores.append((sum(own), own == best))
        return scores


def _asked(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the server's JSON answer, to a POST of ``body`` or else to a GET.

    Raises:
        ValueError: it cannot be reached, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        reason = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        raise ValueError(f"--server: {url} refuses ({error.code}: {reason})") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--server: {url} does not answer ({error}); start it with tools/serve.py"
        ) from None
