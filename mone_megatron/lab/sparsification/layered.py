"""Opens a transformers model of which one decoder layer at a time is in memory.

What is not a decoder layer (embedding, final norm, output layer) stays. Weights are read by
transformers' own loader, so every layout of checkpoints that it knows is known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

import mone_megatron.hf  # noqa: F401  # registers our exports with transformers
from mone_megatron.hf.architectures import FUSED
from mone_megatron.hf.export import check_complete, hf_config, hf_tensors
from mone_megatron.hf.importing import load_hf_config
from mone_megatron.hf.mapping import rules
from mone_megatron.hf.source import Source, is_ours, open_source
from mone_megatron.hf.weights import HFWeights, open_weights
from mone_megatron.lab.sparsification.places import decoder_layers

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Tensors by name of one layer, or with None of everything else.
_Read = Callable[[int | None], Mapping[str, Tensor]]


class LayeredModel:
    """Holds a model with one decoder layer's weights at a time; :func:`open_layered` makes it."""

    def __init__(
        self,
        where: str,
        config: PreTrainedConfig,
        read: _Read,
        *,
        tokenizer_dir: Path,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Builds the model without weights, and reads those that stay.

        Raises:
            ValueError: weights are missing.
        """
        self._where, self._read, self._dtype = where, read, dtype
        self.tokenizer_dir = tokenizer_dir
        self.device = torch.device(device)
        self.model = _without_weights(config, dtype)
        self.decoder: Any = self.model.get_decoder()
        self.layers = decoder_layers(self.model)
        self._load(None)
        # What transformers computes rather than stores: the frequencies of the rotary embedding.
        for name, child in list(self.decoder.named_children()):
            if child is not self.layers and any(one.is_meta for one in child.buffers()):
                self.decoder.add_module(name, type(child)(config=config).to(self.device))
        self.model.tie_weights()
        staying = {
            name: tensor for name, tensor in _tensors(self.model).items() if not _LAYER.search(name)
        }
        self._check(staying)

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Yields a decoder layer with its weights, which are dropped afterwards.

        Raises:
            ValueError: weights are missing.
        """
        layer = self.layers[number]
        self._load(number)
        prefix = f"layers.{number}."
        self._check({prefix + name: tensor for name, tensor in _tensors(layer).items()})
        try:
            yield layer
        finally:
            layer.to("meta")

    @contextmanager
    def standing_in(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Puts ``modules`` in place of the decoder layers while the context lasts."""
        self.decoder.layers = nn.ModuleList(modules)
        try:
            yield
        finally:
            self.decoder.layers = self.layers

    def _load(self, number: int | None) -> None:
        settings = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            device_map={"": self.device},
            weight_mapping=cast(Any, get_model_conversion_mapping(self.model)),
        )
        with _no_bar(), torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, dict(self._read(number)), settings
            )
        # What is missing is found by _check: here that is every other layer.
        for name, *shapes in sorted(info.mismatched_keys):
            raise ValueError(f"{self._where}: {name} is {tuple(shapes[0])}, not {tuple(shapes[1])}")
        for name, reason in info.conversion_errors.items():
            raise ValueError(f"{self._where}: {name} cannot be converted ({reason})")

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"{self._where}: {name} is missing")


def _without_weights(
    config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model.eval()


def model_without_weights(where: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """Returns a model's modules, to look at before its weights are read.

    Args:
        where: a run or checkpoint of ours, a folder in the format of transformers, or a name on
            the Hub; one that ``evaluation.models.look_at`` has accepted.
        trust_remote_code: whether the model may bring code of its own.

    Raises:
        ValueError: transformers cannot build it.
    """
    if is_ours(Path(where)):
        source = open_source(Path(where), say=lambda message: None)
        architecture = source.architecture
        config = hf_config(source, architecture, source.dtype)
    else:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    try:
        return _without_weights(config, None, trust_remote_code)
    except (ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: cannot be built as a language model ({reason})") from None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


@contextmanager
def _no_bar() -> Iterator[None]:
    """Hides the bar that transformers shows for every load, which is one a layer here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def open_layered(
    where: str, *, dtype: torch.dtype | None, device: str, say: Callable[[str], None]
) -> Iterator[LayeredModel]:
    """Opens a folder in the format of transformers, a run or a checkpoint of ours.

    Args:
        where: the folder.
        dtype: of the weights; None for their own.
        device: where a layer is computed.
        say: is told which checkpoint of a run was chosen.

    Raises:
        ValueError: nothing of the kind there, or weights are missing or damaged.
    """
    folder = Path(where)
    if not folder.is_dir():
        raise ValueError(f"--stream: {where} is no folder; download the model first")
    if is_ours(folder):
        source = open_source(folder, say=say)
        dtype = dtype or source.dtype
        config, read = _reader_of_ours(source, dtype)
        yield LayeredModel(
            where, config, read, tokenizer_dir=source.tokenizer_dir, dtype=dtype, device=device
        )
        return
    config = load_hf_config(folder)
    with open_weights(folder) as weights:
        weights.check_dtypes()
        own = config.dtype
        dtype = dtype or (own if isinstance(own, torch.dtype) else weights.main_dtype)
        read = _reader_of(weights)
        yield LayeredModel(where, config, read, tokenizer_dir=folder, dtype=dtype, device=device)


def _layer_of(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def _reader_of(weights: HFWeights) -> _Read:
    def read(number: int | None) -> dict[str, Tensor]:
        names = [name for name in sorted(weights.names) if _layer_of(name) == number]
        return {name: weights.read(name) for name in names}

    return read


def _reader_of_ours(source: Source, dtype: torch.dtype) -> tuple[PreTrainedConfig, _Read]:
    architecture = source.architecture
    config = hf_config(source, architecture, dtype)
    table = list(rules(source.model, source.vocab_size, architecture, FUSED, source.mone))
    check_complete(source, table)

    def read(number: int | None) -> dict[str, Tensor]:
        part = [rule for rule in table if _layer_of(rule.theirs[0][0]) == number]
        return dict(hf_tensors(source, part, dtype))

    return config, read
