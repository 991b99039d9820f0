"""Which config a server's model gets: the one place that joins vLLM's configuration with ours."""

import os
from pathlib import Path
from typing import Any

from vllm_s2o import compat, yaml_file
from vllm_s2o.config import ENVIRONMENT, ConfigError, ModelTraits, Read, ResolvedConfig, expanded, load_config
from vllm_s2o.metrics import place


def resolve(vllm_config: Any, anew: bool = False) -> ResolvedConfig:
    """The config for the model of a VllmConfig. Raises ConfigError.

    A server's processes take a file that the user names as it was when the server started: else one that changes
    meanwhile would be another one for some of them.

    Args:
        anew: from the file itself, where a server starts.
    """
    given = part_of(vllm_config.additional_config)
    traits = traits_of(vllm_config.model_config)
    if compat.is_draft(vllm_config):  # what the user says is meant for the model that is served
        return load_config(traits)
    return load_with(traits, given, yaml_file.read if anew else _read_kept)


def keep(config: ResolvedConfig) -> None:
    """The file that a config was read from, for `resolve` in other processes of the server. Raises OSError."""
    if config.matched == "path":
        place.keep(expanded(config.source))


def _read_kept(path: Path, name: str) -> dict[str, Any]:
    return yaml_file.read(place.kept(path) or path, name)


def load_with(traits: ModelTraits, given: Any = None, read: Read = yaml_file.read) -> ResolvedConfig:
    """`load_config` with the file that the environment names, if it does."""
    return load_config(traits, given, os.environ.get(ENVIRONMENT) or None, read=read)


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
