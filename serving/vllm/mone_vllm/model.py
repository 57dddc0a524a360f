"""Defines ``MoneForCausalLM`` for vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from mone_vllm.definition.methods.rule import STATE_PREFIX
from mone_vllm.layers import MoneDecoderLayer, MoneMLP, MoneSparseMoeBlock
from mone_vllm.refusals import refuse


class MoneForCausalLM(nn.Module, SupportsPP):
    """Runs an export of mone_megatron as a causal language model."""

    hf_to_vllm_mapper = Qwen3MoeModel.hf_to_vllm_mapper
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        on_cpu = current_platform.is_cpu()
        refuse(config, vllm_config, graphs=not (on_cpu or vllm_config.model_config.enforce_eager))
        if not on_cpu:
            # The one whose activation is between two kernels; auto may choose another.
            vllm_config.kernel_config.moe_backend = "triton"
        self.config = config
        self.model = Qwen3MoeModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            decoder_layer_type=MoneDecoderLayer,
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self._checked = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings of the tokens."""
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Returns hidden states; before the first, which vLLM runs at start, checks the experts."""
        if not self._checked:
            for module in self.modules():
                if isinstance(module, MoneSparseMoeBlock):
                    module.check_experts()
            self._checked = True
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Returns logits over the vocabulary; None on ranks to which vLLM gathers none."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the export's weights and returns the names of the parameters that were filled.

        Raises:
            ValueError: a weight has no place, or a parameter has no weight.
        """
        held: dict[str, Tensor] = {}
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._with_place(weights, held))
        # Tied embeddings are one parameter of two names.
        if missing := sorted(set(dict(self.named_parameters())) - loaded):
            raise ValueError(f"{missing[0]}: the export has no weight for it")
        for module in self.modules():
            if isinstance(module, MoneMLP):
                module.remember_norms()
            if isinstance(module, (MoneMLP, MoneSparseMoeBlock)):
                module.take_state(held)
        if held and get_pp_group().world_size == 1:
            raise ValueError(f"{min(held)}: config.mone names no rule with such a state")
        return loaded

    def _with_place(
        self, weights: Iterable[tuple[str, Tensor]], held: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights that vLLM loads.

        Args:
            weights: of the export.
            held: is given the state of selection rules, which vLLM does not know.

        Raises:
            ValueError: a bias has no place, which vLLM would pass over in silence.
        """
        places = {
            "self_attn.q_proj.bias": self.config.qkv_bias,
            "self_attn.k_proj.bias": self.config.qkv_bias,
            "self_attn.v_proj.bias": self.config.qkv_bias,
            "mlp.gate.e_score_correction_bias": self.config.router_bias,
        }
        for name, weight in weights:
            if name.rpartition(".")[2].startswith(STATE_PREFIX):
                held[name] = weight
                continue
            if name.endswith("bias") and not any(
                there and name.endswith(place) for place, there in places.items()
            ):
                raise ValueError(f"{name}: config.json asks for no such bias")
            yield name, weight
