"""Keeps from import to export what an imported model's files say and our settings do not.

The import writes it into its checkpoint's facts, a run that begins with that checkpoint into its
own, and the export puts back what training did not change: special tokens, sliding windows,
generation settings, keys that only the stock class reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mone_megatron.checkpoint.facts import ORIGIN
from mone_megatron.data.files import sha256_file

# What a configuration says about its file, its code and how its weights are stored.
_OF_THE_FILE = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype"),
        *("transformers_version", "quantization_config"),
    }
)
# They depend on the tokenizer, not on the architecture.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Origin:
    """Holds what the files of the model say that a run's weights began as."""

    # config.json and generation_config.json as they are (an empty one if there is none).
    config: dict[str, Any]
    generation: dict[str, Any]
    # Of its tokenizer.json.
    tokenizer_sha256: str

    @classmethod
    def read(cls, folder: Path) -> Origin:
        """Reads the configurations and the tokenizer's digest in a model's folder.

        Raises:
            ValueError: a file cannot be read or is not a JSON object.
        """
        generation = folder / "generation_config.json"
        return cls(
            config=_read_object(folder / "config.json"),
            generation=_read_object(generation) if generation.is_file() else {},
            tokenizer_sha256=sha256_file(folder / "tokenizer.json"),
        )

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Origin | None:
        """Returns the origin in a checkpoint's facts; None when its run had no imported model."""
        return cls(**facts[ORIGIN]) if ORIGIN in facts else None

    def to_facts(self) -> dict[str, Any]:
        """Returns what a checkpoint's facts hold of it, under ``ORIGIN``."""
        return asdict(self)

    @property
    def model_type(self) -> str:
        """Returns its model type as transformers names it: ``qwen3_moe``."""
        return str(self.config["model_type"])

    def standard_config(self) -> PreTrainedConfig:
        """Returns its configuration as transformers reads it.

        Defaults are filled in, and keys have their new names.
        """
        settings = {key: value for key, value in self.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.model_type, **settings)
        assert isinstance(config, PreTrainedConfig)
        return config

    def has_tokenizer(self, folder: Path) -> bool:
        """Returns whether a folder's tokenizer.json is the imported model's, byte for byte."""
        path = folder / "tokenizer.json"
        return path.is_file() and sha256_file(path) == self.tokenizer_sha256

    def merged(
        self, now: Mapping[str, Any], then: Mapping[str, Any] | None, known: frozenset[str]
    ) -> dict[str, Any]:
        """Returns our settings, with the imported model's where training changed nothing.

        Args:
            now: our settings of the model that is exported.
            then: our settings of the model as it was imported, exported as the same architecture;
                None when it is exported as another one.
            known: keys of the architecture; of another one's, only these are kept.
        """
        own = self.standard_config().to_dict()
        unchanged = {key for key in now if then is not None and then.get(key) == now[key]}
        # What it does without, it still does without.
        result = {key: value for key, value in now.items() if key in own or key not in unchanged}
        for key, value in own.items():
            if key in _OF_THE_FILE or (then is None and key not in known):
                continue
            if key not in now or key in unchanged:
                result[key] = value
        return result

    def as_it_was_written(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns a saved configuration that spells values as the imported model's file did.

        transformers reads some values as others (``sliding_window`` beside
        ``use_sliding_window=false`` as null), and saves what it read.

        Args:
            saved: what transformers saved, of the same architecture.
        """
        standard = self.standard_config().to_dict()
        exported = AutoConfig.for_model(
            **{key: value for key, value in saved.items() if key not in _OF_THE_FILE},
            model_type=self.model_type,
        ).to_dict()
        result = dict(saved)
        for key, value in self.config.items():
            same = key in standard and key in exported and standard[key] == exported[key]
            if key not in _OF_THE_FILE and same:
                result[key] = value
        return result


def _read_object(path: Path) -> dict[str, Any]:
    try:
        # Manifests hold no numbers that are not finite.
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value
