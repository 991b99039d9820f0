"""What a model's config.json says of its attention, where no vLLM runs to ask.

    MODEL -> locate -> directory -> read -> Model -> settings.traits_of -> which config it gets
                                                  -> dense_layers      -> which layers cannot be sparse

A `Model` has the names that vLLM's ModelConfig has for the same. What a config.json leaves out is what transformers'
class for the model says; without transformers, what most models mean by it.
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from vllm_s2o.config_errors import show
from vllm_s2o.yaml_file import ConfigError

MAX_BYTES = 2**24
MAX_COUNT = 2**16
"""Layers, heads and sizes of heads stay far below."""

_COUNTS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
}
"""Names in files of which transformers' classes make the first one."""
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_TEXT = ("text_config", "llm_config", "language_config")
"""Where a multimodal model keeps what its language model is."""


@dataclass(frozen=True)
class Model:
    """A model as its config.json describes it."""

    model: str
    """As the user gave it."""
    directory: Path
    hf_config: Any
    hf_text_config: Any
    """The same, or the part of a multimodal model that is its language model."""

    def get_total_num_kv_heads(self) -> int:
        text = self.hf_text_config
        if getattr(text, "model_type", None) == "falcon" and not getattr(text, "new_decoder_architecture", False):
            # Falcon's first models state a number of KV heads that counts for later ones only.
            return 1 if getattr(text, "multi_query", True) else text.num_attention_heads
        return next((n for name in _KV_HEADS if (n := getattr(text, name, None)) is not None), text.num_attention_heads)

    def get_head_size(self) -> int:
        text = self.hf_text_config
        stated = getattr(text, "head_dim", None)
        return stated if stated else text.hidden_size // text.num_attention_heads

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that the model was made for, where the file says so."""
        return getattr(self.hf_text_config, "max_position_embeddings", None)

    @property
    def use_mla(self) -> bool:
        return getattr(self.hf_text_config, "kv_lora_rank", None) is not None

    @property
    def is_encoder_decoder(self) -> bool:
        return any(getattr(part, "is_encoder_decoder", False) for part in (self.hf_config, self.hf_text_config))


def read(name: str) -> Model:
    """The model of a directory or of a name on Hugging Face.

    Raises:
        ConfigError: in one sentence, whatever is wrong.
    """
    directory = locate(name)
    where = f"{name}: its config.json"
    raw = _load(directory / "config.json", where)
    whole = _as_object(raw)
    text = next((part for key in _TEXT if isinstance(part := getattr(whole, key, None), SimpleNamespace)), whole)
    if not _complete(text):
        classes = _of_transformers(directory)
        if classes is not None:
            whole, text = classes
    for count, names in _COUNTS.items():
        value = next((v for key in names if (v := getattr(text, key, None)) is not None), None)
        if count == "hidden_size" and value is None and getattr(text, "head_dim", None):
            continue
        if value is None:
            raise ConfigError(f"{where} has no field '{count}': it does not give the dimensions of its attention.")
        setattr(text, count, value)
    model = Model(name, directory, whole, text)
    checked = {count: getattr(text, count) for count in _COUNTS if hasattr(text, count)}
    for key in ("head_dim", *_KV_HEADS, "max_position_embeddings"):
        if getattr(text, key, None) is not None:
            checked[key] = getattr(text, key)
    for key, value in checked.items():
        most = 2**31 - 1 if key == "max_position_embeddings" else MAX_COUNT
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            allowed = f"a whole number from 1 to {most}"
            raise ConfigError(f"{where} has a field '{key}' that cannot be {show(value)}; allowed is {allowed}.")
    if model.get_head_size() < 1:
        raise ConfigError(f"{where} has fewer values in 'hidden_size' than heads: a head needs one at least.")
    return model


# -- where it is ------------------------------------------------------------------------------------------------------


def locate(name: str) -> Path:
    """The directory that holds the model's config.json; one of Hugging Face's cache where the name is one of theirs."""
    allowed = "allowed is a model's directory, or its name on Hugging Face"
    path = Path(os.path.expanduser(name))
    if not name.strip():
        raise ConfigError(f"the model's name is empty; {allowed}.")
    try:
        if (path / "config.json").is_file():
            return path
        if path.is_dir():
            raise ConfigError(f"{name} is a directory without a config.json; {allowed}.")
        if path.exists():
            raise ConfigError(f"{name} is a file; {allowed}.")
    except OSError as error:  # a name that is too long, or a directory that is closed
        raise ConfigError(f"{name[:80]} cannot be looked at ({error.strerror}); {allowed}.") from None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"there is no directory {name}; {allowed}.")
    return _from_hub(name, allowed).parent


def _from_hub(name: str, allowed: str) -> Path:
    """config.json in Hugging Face's cache, or brought there: a server would fetch it too."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise ConfigError(f"there is no directory {name}, and names need huggingface_hub: {allowed}.") from None
    missing = f"there is no directory {name}, and Hugging Face's cache has no config.json of that name"
    try:
        cached = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if hub.constants.HF_HUB_OFFLINE:
            raise ConfigError(f"{missing}; HF_HUB_OFFLINE keeps from fetching it.")
        host = urlsplit(hub.constants.ENDPOINT).hostname or ""
        if not _reachable(host):  # at once: the client would try for half a minute, and say so every time
            raise ConfigError(f"{missing}; {host} cannot be reached to fetch it.")
        with _quiet("huggingface_hub"):
            return Path(hub.hf_hub_download(name, "config.json"))
    except errors.HFValidationError:
        raise ConfigError(f"there is no directory {name}, and no model can have that name; {allowed}.") from None
    except errors.GatedRepoError:
        raise ConfigError(f"{name} is open only to those who have asked for access to it on Hugging Face.") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(f"there is no directory {name}, and Hugging Face has no model of that name.") from None
    except errors.LocalEntryNotFoundError:  # what the client says of a network that fails; its base is another matter
        raise ConfigError(f"{missing}; fetching it failed.") from None
    except errors.EntryNotFoundError:
        raise ConfigError(f"the model {name} on Hugging Face has no config.json; {allowed}.") from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConfigError(f"{missing}; fetching it failed ({type(error).__name__}).") from None


def _reachable(host: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy knows
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the log of a library that tells of its own tries."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- what it says -----------------------------------------------------------------------------------------------------


def _load(path: Path, where: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{where} is larger than {MAX_BYTES >> 20} MiB.")
        fields = json.loads(data)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}).") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is no JSON text.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} holds no fields; a JSON object is expected.")
    return fields


def _as_object(fields: dict[str, Any]) -> SimpleNamespace:
    parts = {key: _as_object(fields[key]) for key in _TEXT if isinstance(fields.get(key), dict)}
    return SimpleNamespace(**{key: value for key, value in fields.items() if key.isidentifier()} | parts)


def _complete(text: SimpleNamespace) -> bool:
    """Whether a file leaves nothing to the model's class, which takes seconds to load."""
    needed = ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        needed.append("layer_types")  # which layers have the window is up to the class
    return all(getattr(text, name, None) is not None for name in needed)


def _of_transformers(directory: Path) -> tuple[Any, Any] | None:
    """The same files read by the class that transformers has for the model; None where there is none."""
    try:
        from transformers import AutoConfig

        with _quiet("transformers"):
            # Code that lies beside the weights is not run.
            whole = AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
            return whole, whole.get_text_config()
    except Exception:  # no transformers, or a model that it does not know or reads otherwise
        return None


# -- what cannot be sparse --------------------------------------------------------------------------------------------


def dense_layers(model: Model, max_head_size: int) -> dict[int, str]:
    """Layer -> why S2O cannot run it, in the words of `compat.layer_problem`, as far as the file tells.

    A server asks its layers themselves. Layers without attention, of models that have other kinds, are listed too.
    """
    text = model.hf_text_config
    layers = range(text.num_hidden_layers)
    everywhere = _everywhere(model, max_head_size)
    if everywhere is not None:
        return dict.fromkeys(layers, everywhere)
    kinds = getattr(text, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(layers):
        reasons = {layer: _KINDS.get(str(kind), "") for layer, kind in enumerate(kinds)}
        return {layer: reason for layer, reason in reasons.items() if reason}
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return dict.fromkeys(layers, "sliding window")
    return {}


_KINDS = {"sliding_attention": "sliding window"} | dict.fromkeys(
    ("linear_attention", "mamba", "mamba2", "conv", "recurrent"), "no attention"
)
"""What transformers calls kinds of layers."""


def _everywhere(model: Model, max_head_size: int) -> str | None:
    text = model.hf_text_config
    kind = getattr(text, "model_type", None)
    if kind == "bloom" or getattr(text, "alibi", False):
        return "ALiBi"
    if getattr(text, "attn_logit_softcapping", None):
        return "logits soft cap"
    if kind == "gpt_oss":
        return "attention sinks"
    if model.get_head_size() > max_head_size:
        return f"head size {model.get_head_size()}, above {max_head_size}"
    return None
