"""Writes the logits of an exported model on fixed tokens, loaded as any user of it would.

    python export_logits.py EXPORT LOGITS.npz

Nothing of the version that exported it is imported but the model code beside the weights.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

_BATCH, _LENGTH = 2, 48


def main() -> int:
    """Writes ``logits``, fp32 ``[batch, position, vocabulary]``, and ``tokens``."""
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokens = torch.arange(_BATCH * _LENGTH).view(_BATCH, _LENGTH) * 7919 % model.config.vocab_size
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez(sys.argv[2], tokens=tokens.numpy(), logits=logits.numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())
