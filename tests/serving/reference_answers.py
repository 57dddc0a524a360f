"""What transformers answers, in fp32: logprobs of prompts, and greedy tokens with their margins."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mone_megatron.hf  # noqa: F401  # tokenizers of exports are found by their configuration
from mone_megatron.data.stdlib import stdlib_files

# Lengths that share no multiple.
_LENGTHS = (17, 30, 43, 56, 69, 82, 95, 108)


@dataclass(frozen=True)
class Answer:
    """One prompt's."""

    prompt: list[float]  # logprobs of its tokens but the first
    tokens: list[int]
    logprobs: list[float]
    # By how much each token's logprob is above that of the next best.
    margins: list[float]


def prompts_of(model: Path) -> list[list[int]]:
    """Eight beginnings of real files, of as many lengths, in the model's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    root = Path(sysconfig.get_path("stdlib"))
    files = list(stdlib_files(root, 1.0))[: len(_LENGTHS)]
    texts = [(root / path).read_text("utf-8", "ignore")[:6000] for path in files]
    return [tokenizer.encode(text)[:length] for text, length in zip(texts, _LENGTHS, strict=True)]


@torch.no_grad()
def answers_of(
    model: Path, prompts: list[list[int]], new: int, *, experts: str | None = None
) -> list[Answer]:
    """Answers prompts without a cache.

    Args:
        model: folder.
        prompts: token numbers.
        new: how many tokens to generate.
        experts: an experts implementation other than the model's own: "grouped_mm" keeps all
            neurons, as an engine that does not select would.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=True
    ).eval()
    if experts is not None:
        loaded.set_experts_implementation(experts)
    answers = []
    for prompt in prompts:
        found = Answer([], [], [], [])
        text = list(prompt)
        for step in range(new + 1):
            logprobs = loaded(torch.tensor([text])).logits[0].log_softmax(-1)
            if step == 0:
                found.prompt.extend(
                    logprobs[place, token].item() for place, token in enumerate(prompt[1:])
                )
            if step == new:
                break
            best = logprobs[-1].topk(2)
            found.tokens.append(int(best.indices[0]))
            found.logprobs.append(best.values[0].item())
            found.margins.append((best.values[0] - best.values[1]).item())
            text.append(found.tokens[-1])
        answers.append(found)
    return answers


def differences(expected: list[Answer], texts: list[dict[str, list[float]]]) -> list[float]:
    """How far logprobs are apart: of all prompts, and of greedy tokens up to a first difference."""
    far = []
    for answer, text in zip(expected, texts, strict=True):
        far += [abs(a - b) for a, b in zip(answer.prompt, text["prompt"], strict=True)]
        for place in range(first_difference(answer, text)):
            far.append(abs(answer.logprobs[place] - text["logprobs"][place]))
    return far


def first_difference(answer: Answer, text: dict[str, list[float]]) -> int:
    """The place of the first token that differs; the number of tokens if none does."""
    pairs = zip(answer.tokens, text["tokens"], strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(answer.tokens))
