"""Which config a server's model gets: the one place that joins vLLM's configuration with ours."""

import os
from typing import Any

from vllm_s2o import compat
from vllm_s2o.config import ENVIRONMENT, ConfigError, ModelTraits, ResolvedConfig, load_config


def resolve(vllm_config: Any) -> ResolvedConfig:
    """The config for the model of a VllmConfig. Raises ConfigError."""
    given = part_of(vllm_config.additional_config)
    traits = traits_of(vllm_config.model_config)
    if compat.is_draft(vllm_config):  # what the user says is meant for the model that is served
        return load_config(traits)
    return load_with(traits, given)


def load_with(traits: ModelTraits, given: Any = None) -> ResolvedConfig:
    """`load_config` with the file that the environment names, if it does."""
    return load_config(traits, given, os.environ.get(ENVIRONMENT) or None)


def part_of(additional: Any) -> Any:
    """What --additional-config holds for S2O; None where it holds nothing."""
    if not isinstance(additional, dict):
        return None
    for key in additional:
        if key != "s2o" and str(key).lower().replace("-", "_") in ("s2o", "vllm_s2o"):
            raise ConfigError(f"--additional-config has the key '{key}'; allowed is 's2o'.")
    return additional.get("s2o")


def traits_of(model_config: Any) -> ModelTraits:
    """Of vLLM's ModelConfig, or of a `model.Model`, which has the same names."""
    try:
        return ModelTraits(**compat.model_traits(model_config))
    except (AttributeError, TypeError) as error:  # a config.json may hold anything
        raise ConfigError(f"The model's config.json does not give the dimensions of its attention ({error}).") from None
