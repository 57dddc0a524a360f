"""Serves Mixture-of-Neuron-Experts models in vLLM.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``).
"""

import logging


def register() -> None:
    """Makes exports of ours known to vLLM; again is fine. Imports none of vLLM's layers.

    A vLLM outside the supported range is said, and refused when a model of ours is asked for; it
    serves other models as before.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from mone_vllm.config import MoneConfig
    from mone_vllm.versions import unsupported_vllm

    if reason := unsupported_vllm():
        logging.getLogger(__name__).warning(reason)
    # Known here, config.json's auto_map is not followed: no --trust-remote-code.
    AutoConfig.register(MoneConfig.model_type, MoneConfig, exist_ok=True)
    ModelRegistry.register_model("MoneForCausalLM", "mone_vllm.model:MoneForCausalLM")
