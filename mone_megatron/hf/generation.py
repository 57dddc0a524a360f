"""Generates text with a model, streamed as it comes, and times the prompt and each token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

from mone_megatron.hf.decode_mone import MONE_SPARSE, speeds_up
from mone_megatron.hf.experts_mone import (
    MONE,
    MONE_BATCHED,
    ExpertsModule,
    experts_modules,
    selects,
)

# Ways to compute experts that need settings of the selection.
SELECTING = (MONE, MONE_BATCHED, MONE_SPARSE)


@dataclass(frozen=True)
class Sampling:
    """Describes how the next token is chosen: greedily at temperature 0."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: naming the option.
        """
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: {self.max_new_tokens} is not 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"--temperature: {self.temperature:g} is not a number from 0 on; 0 is greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p: {self.top_p:g} is not in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"--top-k: {self.top_k} is negative; 0 is no limit")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("--top-p and --top-k: need a --temperature above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the arguments for transformers' ``generate``."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def choose_experts(model: PreTrainedModel, wanted: str) -> str:
    """Sets how a model computes its experts, and returns in words what that is.

    Args:
        model: any; a dense one has no choice, and takes "auto" only.
        wanted: a name that transformers knows, or "auto": the rows of kept neurons only where the
            model selects neurons and that pays, else as the model is.

    Raises:
        ValueError: for experts of a dense model, or selection in a model without settings for it.
    """
    if wanted == "auto":
        chosen = getattr(model.config, "num_experts_per_tok", None)
        if chosen is None or not speeds_up(model, chosen):
            return "as the model has them"
        model.set_experts_implementation(MONE_SPARSE)
        return MONE_SPARSE
    modules = experts_modules(model)
    if not modules:
        raise ValueError(f"--experts: {type(model).__name__} has no experts to compute by {wanted}")
    if wanted in SELECTING and not all(selects(cast(ExpertsModule, each)) for each in modules):
        raise ValueError(
            f"--experts: {wanted} selects neurons, and {type(model).__name__} has no settings for "
            "that (config.mone); use auto, grouped_mm or batched_mm"
        )
    model.set_experts_implementation(wanted)
    return wanted


@dataclass(frozen=True)
class Generated:
    """Holds what came of a batch of prompts."""

    texts: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    # Until the first new token, and from it to the last.
    prompt_seconds: float
    decode_seconds: float

    def describe(self) -> str:
        """Returns one line: tokens a second for the prompts and for what followed."""
        line = (
            f"{self.prompt_tokens} prompt tokens in {self.prompt_seconds:.2f} s "
            f"({self.prompt_tokens / self.prompt_seconds:,.0f} tokens/s)"
        )
        # The first token comes with the prompt.
        later = self.new_tokens - len(self.texts)
        if later > 0:
            line += (
                f"; {later} more tokens in {self.decode_seconds:.2f} s "
                f"({later / self.decode_seconds:,.1f} tokens/s)"
            )
        return line


class _Clock(BaseStreamer):
    """Notes when the prompt and the first new token have come; shows text if asked to."""

    def __init__(self, shown: TextStreamer | None) -> None:
        self.shown = shown
        self.first: float | None = None
        self._prompts_seen = False

    def put(self, value: Tensor) -> None:
        """Notes the time of the first new tokens; the first call brings the prompts."""
        if self._prompts_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompts_seen = True
        if self.shown is not None:
            self.shown.put(value)

    def end(self) -> None:
        """Tells the shown text that the last token has come."""
        if self.shown is not None:
            self.shown.end()


class _Printer(TextStreamer):
    """Gives finished words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Gives the next piece of text to the function."""
        self._show(text)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Continues prompts, all at once.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompts: not empty.
        sampling: how tokens are chosen, and how many.
        show: is given the text piece by piece as it comes; with one prompt only.

    Raises:
        ValueError: an empty prompt, or one with more tokens than the model was made for.
    """
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    limit = model.config.get_text_config().max_position_embeddings
    for number, row in enumerate(rows, start=1):
        if not row:
            raise ValueError(f"prompt {number}: is empty; give at least one token")
        if len(row) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"prompt {number}: {len(row)} tokens and --max-new-tokens="
                f"{sampling.max_new_tokens} are more than the {limit} the model was trained on"
            )
    eos = model.generation_config.eos_token_id
    pad = eos if isinstance(eos, int) else 0
    length = max(map(len, rows))
    # On the left: new tokens follow the last one of each prompt.
    batch = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    assert show is None or len(rows) == 1
    clock = _Clock(_Printer(tokenizer, show) if show else None)
    torch.manual_seed(sampling.seed)
    started = time.perf_counter()
    continued: Any = model.generate  # its type is lost in the library's mixins
    produced: Tensor = continued(
        batch.to(model.device),
        attention_mask=mask.to(model.device),
        pad_token_id=pad,
        streamer=clock if len(rows) == 1 else None,
        **sampling.settings,
    )
    ended = time.perf_counter()
    new = produced[:, length:]
    first = clock.first or ended
    if len(rows) > 1:
        # transformers streams one sequence only: the prompts' share is measured by itself.
        first = started + _prompt_seconds(model, batch, mask)
    texts = tuple(tokenizer.batch_decode(new, skip_special_tokens=True))
    return Generated(
        texts=texts,
        prompt_tokens=sum(map(len, rows)),
        new_tokens=_count(new, eos),
        prompt_seconds=first - started,
        decode_seconds=max(ended - first, 1e-9),
    )


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Returns a prompt's tokens as a text begins; an opening that it spells out comes once."""
    whole: list[int] = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    own: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    opening = whole[: len(whole) - len(own)]
    return own if opening and own[: len(opening)] == opening else whole


@torch.no_grad()
def _prompt_seconds(model: PreTrainedModel, batch: Tensor, mask: Tensor) -> float:
    started = time.perf_counter()
    model(batch.to(model.device), attention_mask=mask.to(model.device), logits_to_keep=1)
    return time.perf_counter() - started


def _count(new: Tensor, eos: int | list[int] | None) -> int:
    """Returns how many tokens were generated, without what pads a text to the longest."""
    if eos is None:
        return new.numel()
    ends = torch.isin(new, torch.tensor(eos, device=new.device))
    # The end itself counts; everything after it is padding.
    return int((ends.cumsum(dim=-1) - ends.long()).eq(0).sum())
