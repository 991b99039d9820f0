"""Which config a server's model gets: the one place that joins vLLM's configuration with ours."""

import copy
import os
from typing import Any

from vllm_s2o import compat
from vllm_s2o.config import ENVIRONMENT, ConfigError, ModelTraits, ResolvedConfig, load_config

KEPT = "s2o_config"
"""What a VllmConfig has in addition, once it was asked for: what the user gave, and what that came to."""


def resolve(vllm_config: Any) -> ResolvedConfig:
    """The config for the model of a VllmConfig. Raises ConfigError.

    Files are read once, by the process that a user starts: it hands its VllmConfig to engines and workers, and what it
    read with it. A file that changes or goes while a server runs changes nothing in it, not for one of its processes.
    """
    given = part_of(vllm_config.additional_config)
    traits = traits_of(vllm_config.model_config)
    if compat.is_draft(vllm_config):  # what the user says is meant for the model that is served
        return load_config(traits)
    kept = getattr(vllm_config, KEPT, None)
    if kept is not None and kept[0] == given and kept[1].traits == traits:  # else it is a copy that was changed
        return kept[1]
    resolved = load_with(traits, given)
    setattr(vllm_config, KEPT, (copy.deepcopy(given), resolved))
    return resolved


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
