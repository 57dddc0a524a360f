"""Trains transformers' model of the same shape by the loop that its users write.

It needs the ``hf`` extra. The loop: microbatches one after the other, gradients clipped by their
norm, torch's fused AdamW.
"""

from __future__ import annotations

import itertools

import torch
from transformers import AutoModelForCausalLM

from mone_megatron.config.schema import Config, ModelConfig, MoNEConfig
from mone_megatron.hf.architectures import MONE, choose
from mone_megatron.hf.settings import to_hf_config
from mone_megatron.lab.benchmarks.peers.task import PeerTask

# Of the free memory, what the copies of weights that batched_mm makes may take.
_MEMORY_SHARE = 0.25


class TransformersWork:
    """Trains one model of transformers."""

    def __init__(self, task: PeerTask) -> None:
        """Builds it.

        Raises:
            ValueError: transformers has no such model, or not the memory for its experts.
        """
        config = task.config
        architecture = choose(config.model, mone=False)
        if architecture is MONE:
            raise ValueError("peers: transformers has no architecture that holds this model")
        if task.experts == "batched_mm":
            _refuse_copies(config)
        self.device = torch.device(config.device.kind)
        bf16 = config.device.dtype == "bf16" or (
            config.device.dtype == "auto" and self.device.type == "cuda"
        )
        if config.device.threads:
            torch.set_num_threads(config.device.threads)
        torch.manual_seed(config.train.seed)
        settings = to_hf_config(
            config.model,
            MoNEConfig(),
            architecture=architecture,
            vocab_size=config.model.padded_vocab_size(task.vocab_size),
            max_positions=config.train.seq_length,
            dtype="bfloat16" if bf16 else "float32",
            token_ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        )
        settings.use_cache = False
        settings.output_router_logits = bool(config.model.num_experts)
        settings._attn_implementation = "sdpa"
        settings._experts_implementation = task.experts
        model = AutoModelForCausalLM.from_config(settings)
        self.model = model.to(self.device, torch.bfloat16 if bf16 else torch.float32).train()
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.clip = optim.clip_grad
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.steps = itertools.cycle(task.steps)

    def step(self) -> float:
        """Trains one step and returns its loss, the balance of experts included."""
        microbatches = next(self.steps)
        total = 0.0
        for microbatch in microbatches:
            tokens, labels = (
                torch.from_numpy(microbatch[name]).to(self.device) for name in ("tokens", "labels")
            )
            loss = self.model(input_ids=tokens, labels=labels, shift_labels=labels).loss
            (loss / len(microbatches)).backward()
            total += loss.item()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return total / len(microbatches)


def _copied_bytes(model: ModelConfig, tokens: int) -> int:
    """Returns the bytes of the weights that batched_mm copies for each token, over all layers."""
    expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    layers = model.num_layers - model.first_dense_layers
    return tokens * model.experts_per_token * expert * 4 * layers


def _refuse_copies(config: Config) -> None:
    tokens = config.train.micro_batch_size * config.train.seq_length
    needed = _copied_bytes(config.model, tokens)
    free = _free_bytes(config.device.kind)
    if needed > _MEMORY_SHARE * free:
        raise ValueError(
            f"it copies an expert's weights for each token: {needed / 2**30:.1f} GiB a microbatch, "
            f"of {free / 2**30:.1f} GiB free"
        )


def _free_bytes(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ValueError("peers: the free memory is read from Linux's /proc")
