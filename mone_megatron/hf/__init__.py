"""Brings MoNE to transformers, and converts models from and to Hugging Face.

``import mone_megatron.hf`` registers the experts implementations ``mone``, ``mone_batched_mm`` and
``mone_sparse`` and the exported model's class, so that ``AutoModelForCausalLM.from_pretrained``
loads an export. It needs the ``hf`` extra (``pip install -e '.[hf]'``) and no megatron-core.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.decode_mone import register_decoding
from mone_megatron.hf.experts_mone import NeuronSettings, enable_mone
from mone_megatron.hf.modeling_mone import MoneForCausalLM, MoneModel

register_decoding()
AutoConfig.register(MoneConfig.model_type, MoneConfig, exist_ok=True)
AutoModel.register(MoneConfig, MoneModel, exist_ok=True)
AutoModelForCausalLM.register(MoneConfig, MoneForCausalLM, exist_ok=True)

__all__ = ["MoneConfig", "MoneForCausalLM", "MoneModel", "NeuronSettings", "enable_mone"]
