"""Which config a server's model gets: the one place that joins vLLM's configuration with ours."""

import os

from vllm_s2o import compat
from vllm_s2o.config import ConfigError, ModelTraits, ResolvedConfig, load_config

CONFIG_VARIABLE = "VLLM_S2O_CONFIG"
"""Path of a config file, where --additional-config names none."""


def resolve(vllm_config) -> ResolvedConfig:
    """The config for the model of a VllmConfig. Raises ConfigError."""
    additional = vllm_config.additional_config
    given = None
    if isinstance(additional, dict):
        given = additional.get("s2o")
        for key in additional:
            if key != "s2o" and str(key).lower().replace("-", "_") in ("s2o", "vllm_s2o"):
                raise ConfigError(f"--additional-config has the key '{key}'; allowed is 's2o'.")
    if compat.is_draft(vllm_config):  # what the user says is meant for the model that is served
        return load_config(_traits(vllm_config.model_config))
    return load_config(_traits(vllm_config.model_config), given, os.environ.get(CONFIG_VARIABLE) or None)


def _traits(model_config) -> ModelTraits:
    try:
        return ModelTraits(**compat.model_traits(model_config))
    except (AttributeError, TypeError) as error:  # a config.json may hold anything
        raise ConfigError(f"The model's config.json does not give the dimensions of its attention ({error}).") from None
