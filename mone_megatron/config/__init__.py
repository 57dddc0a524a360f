"""Holds the typed configuration: `schema` (what there is), `load` (YAML to it), `validate`.

Only the parts without third-party imports are re-exported, so that importing the schema does not
import Hydra.
"""

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate

__all__ = ["Config", "ConfigError", "Layout", "validate"]
