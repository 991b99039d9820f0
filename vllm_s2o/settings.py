"""Which config a server's model gets: the one place that joins vLLM's configuration with ours."""

import os

from vllm_s2o import compat
from vllm_s2o.config import ModelTraits, ResolvedConfig, load_config

CONFIG_VARIABLE = "VLLM_S2O_CONFIG"
"""Path of a config file, where --additional-config names none."""


def resolve(vllm_config) -> ResolvedConfig:
    """The config for the model of a VllmConfig. Raises ConfigError."""
    additional = vllm_config.additional_config
    given = additional.get("s2o") if isinstance(additional, dict) else None
    traits = ModelTraits(**compat.model_traits(vllm_config.model_config))
    return load_config(traits, given, os.environ.get(CONFIG_VARIABLE) or None)
