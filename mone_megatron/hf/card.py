"""Makes the model card of an export: what the model is, how it was trained, how to load it."""

from __future__ import annotations

import json

import torch

from mone_megatron import __version__
from mone_megatron.hf.architectures import MONE, Architecture
from mone_megatron.hf.source import Source
from mone_megatron.hf.text_format import describe
from mone_megatron.planning.budget import usage_is_fixed
from mone_megatron.planning.parameters import ParameterCount, count_parameters

_LOAD_STOCK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
"""
_LOAD_MONE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

# The model's code lies beside its weights; with mone_megatron installed, `import mone_megatron.hf`
# takes the place of trust_remote_code.
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
"""
# Metrics of the last step that a reader wants, as metrics.jsonl names them.
_METRICS = ("loss", "val_loss", "tokens")


def model_card(
    source: Source, architecture: Architecture, dtype: torch.dtype, verified: str
) -> str:
    """Returns Markdown with the front matter that the Hub reads.

    Args:
        source: the checkpoint.
        architecture: what it was exported as.
        dtype: of most weights.
        verified: what the export's own check found.
    """
    config, model, mone = source.config, source.model, source.mone
    count = count_parameters(model, mone, source.vocab_size)
    tags = ["mixture-of-experts"] + (["mixture-of-neuron-experts"] if mone.enabled else [])
    facts = {
        "architecture": f"`{architecture.class_name}`, {str(dtype).removeprefix('torch.')}",
        "parameters": f"{count.total:,}",
        **_activated(source, count),
        "layers, hidden size": f"{model.num_layers}, {model.hidden_size}",
        "experts, a token": f"{model.num_experts}, {model.experts_per_token}",
        "vocabulary": f"{source.vocab_size:,}",
        "documents": describe(source.framing, source.tokenizer_dir),
        "steps trained": f"{source.checkpoint.step:,}",
        "batch, sequence length": f"{config.train.global_batch_size}, {config.train.seq_length}",
        "seed": f"{config.train.seed}",
    }
    if model.experts == "product_key":
        keys = model.product_key
        facts["experts, a token"] = (
            f"{keys.keys**2:,} of one neuron, {keys.heads * keys.experts_per_head} in "
            f"{keys.heads} heads"
        )
    elif not model.num_experts:
        del facts["experts, a token"]
    if mone.enabled:
        facts["neuron selection"] = (
            f"keep ratio {mone.keep_ratio:g} by {mone.score} in {', '.join(mone.apply_to)} MLPs"
        )
    facts |= _metrics(source)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    if mone.enabled:
        kind = "Mixture of Neuron Experts ([arXiv 2510.05781](https://arxiv.org/abs/2510.05781))"
    elif model.experts == "product_key":
        kind = "model of product-key experts ([arXiv 2407.04153](https://arxiv.org/abs/2407.04153))"
    else:
        kind = "Mixture of Experts" if model.num_experts else "dense model"
    load = _LOAD_MONE if architecture is MONE else _LOAD_STOCK
    front = "\n".join(f"  - {tag}" for tag in tags)
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{front}
---

# {config.run.name}

A {kind}, trained and exported with mone_megatron {__version__}.

```python
{load}```

| | |
|---|---|
{rows}

Checked at export: {verified}.

The recipe is in `training_config.yaml`.
"""


def _activated(source: Source, planned: ParameterCount) -> dict[str, str]:
    """Returns what a token activates, as measured at the run's end if the method leaves it open."""
    counts, how = planned.recorded, ""
    if not usage_is_fixed(source.config):
        how = ", planned"
        # run.dir/checkpoints/step_N
        path = source.checkpoint.path.parent.parent / "run.json"
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if facts.get("measured") and facts.get("steps") == source.checkpoint.step:
            counts, how = facts["measured"]["parameters"], ", measured"
    return {
        f"activated a token ({words}{how})": f"{counts[name]:,}"
        for words, name in (
            ("gate counted", "activated_gate_counted"),
            ("neurons only", "activated_neurons_only"),
        )
    }


def _metrics(source: Source) -> dict[str, str]:
    """Returns what the run logged last up to the checkpoint's step; empty without its metrics."""
    # run.dir/checkpoints/step_N
    path = source.checkpoint.path.parent.parent / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        if record["step"] <= source.checkpoint.step:
            found |= {key: record[key] for key in _METRICS if record.get(key) is not None}
    return {name.replace("_", " "): f"{value:,.6g}" for name, value in found.items()}
