"""Which parameters a model runs with: one YAML file a model, matched, overridden, and told apart by origin."""

import contextlib
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from vllm_s2o import yaml_file
from vllm_s2o.config_errors import ADDITIONAL, show, validate
from vllm_s2o.config_file import ConfigFile, Match, ModelTraits, Settings, ranges
from vllm_s2o.params import S2OParams, threshold_range
from vllm_s2o.yaml_file import ConfigError

__all__ = ["ConfigError", "ModelTraits", "ResolvedConfig", "S2OParams", "load_config", "load_file"]

ENVIRONMENT = "VLLM_S2O_CONFIG"
"""Path of a config file, where --additional-config names none."""

Matched = Literal["name", "dimensions", "default", "path"]

_FOUND: dict[Matched, str] = {
    "name": "matched by name",
    "dimensions": "matched by architecture and dimensions",
    "default": "no file matches this model",
    "path": "named by the user",
}


@dataclass(frozen=True)
class ResolvedConfig:
    """The config of one model, checked against its layers and heads."""

    file: ConfigFile
    traits: ModelTraits
    source: str
    """The file that was started from: a shipped one's name, or the path that the user gave."""
    matched: Matched
    """How it was found."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted field -> where its value came from."""
    named_by: str | None = None
    """What named the file, where none was looked for."""
    num_file_layers: int = 0
    """How many of `file.layers` come from the file: the first ones. The others are the user's."""
    num_replaced: int = 0
    """How many of the file's are left out, because the user gave a threshold for all layers."""

    @property
    def params(self) -> S2OParams:
        return self.file.params

    @property
    def min_seq_len(self) -> int:
        return self.file.min_seq_len

    @property
    def min_query_len(self) -> int:
        return self.file.min_query_len

    @property
    def calibrated(self) -> bool:
        return self.file.provenance.calibrated

    @property
    def provenance(self) -> str:
        return str(self.file.provenance)

    @property
    def found(self) -> str:
        """How the file was found, in words."""
        return _FOUND[self.matched]

    def layer(self, index: int) -> S2OParams | None:
        """What layer `index` of the model runs with; None where it stays dense."""
        params, dense = self.params, False
        for override in self.file.layers:
            if not any(index in layers for layers in ranges(override.layers)):
                continue
            never_stops = override.threshold == "dense"
            threshold: Any = 0.0 if never_stops else override.threshold
            if override.heads is None:
                dense = never_stops
            else:
                # Heads that get a threshold in a dense layer make it sparse; its other heads never stop.
                dense = dense and never_stops
                per_head = list(params.thresholds(self.traits.num_heads))
                for heads in ranges(override.heads):
                    per_head[heads.start : heads.stop] = [threshold] * len(heads)
                threshold = tuple(per_head)
            params = params.model_copy(update={"threshold": threshold})
        return None if dense else params

    def describe(self, min_query_len: int | None = None) -> list[str]:
        """Short lines for a server's log, with the `min_query_len` that applies where the server raised it."""
        params, layers = self.params, [self.layer(i) for i in range(self.traits.num_layers)]
        sparse = [layer for layer in layers if layer is not None]
        changed = sum(layer != params for layer in sparse)
        values = "calibrated" if self.calibrated else "not calibrated"
        stop = f"threshold={threshold_range(sparse or [params])}"
        if params.reference_len is not None:
            stop += f" up to {params.reference_len} keys"
        own = f", {changed} of {len(layers)} layers have thresholds of their own"
        if params.budget is not None:  # thresholds count for nothing then
            stop, own = f"budget={params.budget:g} (WARNING: no stop rule, for benchmarks only)", ""
        shared = " ranking=kv_head" if params.ranking == "kv_head" else ""
        min_query = f"min_query_len={min_query_len or self.min_query_len}"
        if min_query_len not in (None, self.min_query_len):
            min_query += f" (not {self.min_query_len}: decode stays dense)"
        lines = [
            f"config {self.source} ({self.found}; {values}: {self.provenance})",
            f"{stop} segment_len={params.segment_len}{shared} "
            f"min_seq_len={self.min_seq_len} {min_query} "
            f"{layers.count(None)} of {len(layers)} layers dense{own}",
        ]
        overridden = sorted(name for name, origin in self.origins.items() if ADDITIONAL in origin)
        if overridden:
            lines.append(f"overridden by {ADDITIONAL}: {', '.join(overridden)}")
        if self.num_replaced:
            count = f"{self.num_replaced} threshold{'s' if self.num_replaced > 1 else ''}"
            lines.append(f"params.threshold of {ADDITIONAL} replaces {count} of single layers in {self.source}")
        return lines

    def no_effect(self, max_model_len: int, chunk: int | None = None) -> str | None:
        """Why no sequence that a server accepts will be sparse, or None.

        Args:
            chunk: the most tokens of a prompt that one step computes, where that is known.
        """
        if self.min_seq_len > max_model_len:
            return (
                f"no effect: min_seq_len={self.min_seq_len} is above the longest sequence, "
                f"--max-model-len {max_model_len}."
            )
        if chunk is not None and chunk < self.min_query_len:
            return (
                f"no effect: min_query_len={self.min_query_len} is above the most tokens of a prompt that a step "
                f"computes, {chunk} (--max-num-batched-tokens, --long-prefill-token-threshold)."
            )
        return None

    def beyond(self, max_model_len: int) -> str | None:
        """That prompts may be longer than those that the values were searched on, or None: also where no searched value
        is left, or no prompt is sparse."""
        searched = (self.file.provenance.calibration or {}).get("tokens") if self.calibrated else None
        given = self.params.budget is not None or ADDITIONAL in self.origins.get("params.threshold", "")
        if not isinstance(searched, int) or searched >= max_model_len or given or self.no_effect(max_model_len):
            return None
        return (
            f"{self.source} was searched at {searched} tokens, and prompts may have {max_model_len}: "
            f"`vllm-s2o evaluate MODEL --tokens {max_model_len} --text code --text needles` tells what it costs there."
        )

    def digest(self) -> str:
        """Short hash of everything that changes results, and of nothing else."""
        layers = [self.params, *(self.layer(i) for i in range(self.traits.num_layers))]
        unused = None if self.params.budget is None else {"threshold", "reference_len"}
        dumped = [layer and layer.model_dump(exclude=unused) for layer in layers]
        effective = [self.min_seq_len, self.min_query_len, *dumped]
        return hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()[:12]


def load_config(
    traits: ModelTraits,
    additional: str | dict | None = None,
    env: str | None = None,
    configs_dir: Path | Traversable | None = None,
) -> ResolvedConfig:
    """Find, merge and check the config of a model.

    Args:
        traits: the model.
        additional: "s2o" of vLLM's --additional-config: a path, or fields that override; the field
            "config" among them is a path to start from. Parameters may stand at the top level.
        env: a path to start from where `additional` names none.
        configs_dir: directory of the files to match; the shipped ones by default.

    Raises:
        ConfigError: in one sentence, whatever is wrong.
    """
    with _one_line():
        return _load(traits, additional, env, configs_dir or importlib.resources.files("vllm_s2o.configs"))


def load_file(path: str) -> ConfigFile:
    """A file by itself: whether its layers and heads exist is known with a model only.

    Raises:
        ConfigError: in the sentence that `load_config` has for it.
    """
    with _one_line():
        if not path.strip():
            raise ConfigError("the name of the file is empty; a path to a YAML config file is expected.")
        return _checked(yaml_file.read(_expanded(path), path), path)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:  # a path may hold a line break; the sentence stays one line
        raise ConfigError(" ".join(str(error).split())) from None


def _load(traits: ModelTraits, additional: Any, env: str | None, directory: Path | Traversable) -> ResolvedConfig:
    overrides: dict[str, Any] = {}
    named_by: str | None
    path, named_by = additional, ADDITIONAL
    if isinstance(additional, dict):
        overrides = _lift_params(additional)
        path, named_by = overrides.pop("config", None), f"{ADDITIONAL}: the field 'config'"
    if path is None:
        path, named_by = env, ENVIRONMENT
    if path is None:
        (fields, source, matched), named_by = _find(traits, directory), None
    else:
        fields, source, matched = _read_path(path, named_by), str(path), "path"
    file = _checked(fields, source)
    _check_layers(file, traits, source)
    origins = dict.fromkeys(_dotted(ConfigFile().model_dump()), "default")
    origins |= dict.fromkeys(_dotted(fields), source)
    from_file, replaced = len(file.layers), 0
    if overrides:
        validate(Settings, overrides, ADDITIONAL, partial=True)
        origins |= dict.fromkeys(_dotted(overrides), ADDITIONAL)
        merged = {**fields, **overrides, "params": {**fields.get("params", {}), **overrides.get("params", {})}}
        kept = given = fields.get("layers", [])
        if "threshold" in overrides.get("params", {}):
            # It is meant for all layers, and those that the file has for single ones would lie over it.
            kept = [override for override in given if override["threshold"] == "dense"]
        from_file, replaced = len(kept), len(given) - len(kept)
        merged["layers"] = [*kept, *overrides.get("layers", [])]
        if given:
            origins["layers"] = f"{source}, {ADDITIONAL}" if replaced or overrides.get("layers") else source
        file = validate(ConfigFile, merged, f"{source} with {ADDITIONAL}")
        _refuse_unused_thresholds(overrides, file, ADDITIONAL)
        _check_layers(file, traits, ADDITIONAL, from_file)
    resolved = ResolvedConfig(file, traits, source, matched, origins, named_by, from_file, replaced)
    _check_heads(resolved)
    return resolved


def _checked(fields: dict[str, Any], source: str) -> ConfigFile:
    file = validate(ConfigFile, fields, source)
    _refuse_unused_thresholds(fields, file, source)
    return file


def _refuse_unused_thresholds(given: dict[str, Any], file: ConfigFile, source: str) -> None:
    """A budget runs without a stop rule. It may lie over a file's thresholds, but nobody shall give one in vain."""
    budget = file.params.budget
    if budget is None:
        return
    unused = ["params.threshold"] if "threshold" in given.get("params", {}) else []
    for number, override in enumerate(given.get("layers", ())):
        if override["threshold"] != "dense" or override.get("heads") is not None:
            unused.append(f"layers.{number}.threshold")
    if unused:
        raise ConfigError(
            f"{source}: the field '{unused[0]}' has no effect with the budget {budget:g} ('params.budget'), "
            "which has no stop rule; leave one of them out, or set the budget to null."
        )


def _lift_params(given: dict) -> dict[str, Any]:
    """Fields of S2OParams at the top level go to `params`."""
    fields = dict(given)
    params = fields.get("params", {})
    if not isinstance(params, dict):
        return fields  # refused with the rest
    params = dict(params)
    for name in [name for name in fields if name in S2OParams.model_fields]:
        if name in params:
            raise ConfigError(f"{ADDITIONAL}: '{name}' stands twice, at the top level and in 'params'; give it once.")
        params[name] = fields.pop(name)
    return {**fields, "params": params} if params else fields


def _read_path(given: Any, named_by: str) -> dict[str, Any]:
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        also = ", or an object of fields" if named_by == ADDITIONAL else ""
        raise ConfigError(f"{named_by} cannot be {show(given)}; allowed is the path of a YAML config file{also}.")
    return yaml_file.read(_expanded(given), f"{given} (named by {named_by.partition(':')[0]})")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user's home that does not exist
        return Path(path)


def _find(traits: ModelTraits, directory: Path | Traversable) -> tuple[dict[str, Any], str, Matched]:
    """The shipped file for a model: by name, else by dimensions, else the default."""
    fields, matches = {}, {}
    for entry in sorted(directory.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            with importlib.resources.as_file(entry) as path:
                fields[entry.name] = yaml_file.read(path, entry.name)
            matches[entry.name] = validate(ConfigFile, fields[entry.name], entry.name).match
    ranks: tuple[tuple[Matched, Callable[[Match, ModelTraits], bool]], ...] = (
        ("name", Match.by_name), ("name", Match.by_last_part), ("dimensions", Match.by_dimensions),
    )  # fmt: skip
    for how, fits in ranks:
        found = [name for name, match in matches.items() if fits(match, traits)]
        if len(found) > 1:
            raise ConfigError(
                f"{' and '.join(found)} both match the model {traits.name} by {how} (field 'match'); "
                f'exactly one may, or name the file to use with --additional-config \'{{"s2o": "PATH"}}\'.'
            )
        if found:
            return fields[found[0]], found[0], how
    if "default.yaml" not in fields:
        raise ConfigError(
            f"no config file matches the model {traits.name} (field 'match'), and {directory} has no default.yaml."
        )
    return fields["default.yaml"], "default.yaml", "default"


def _dotted(fields: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in fields.items():
        names += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return names


def _check_heads(config: ResolvedConfig) -> None:
    traits, threshold = config.traits, config.params.threshold
    if isinstance(threshold, tuple) and len(threshold) != traits.num_heads:
        raise ConfigError(
            f"{config.origins['params.threshold']}: the field 'params.threshold' lists {len(threshold)} heads, "
            f"but the model {traits.name} has {traits.num_heads}; allowed is one value, or one per query head."
        )


def _check_layers(file: ConfigFile, traits: ModelTraits, source: str, first: int = 0) -> None:
    """Of the overrides from the `first` on, which `source` has."""
    for number, override in enumerate(file.layers[first:]):
        for name, count in (("layers", traits.num_layers), ("heads", traits.num_heads)):
            given = getattr(override, name)
            if given is not None and any(part.stop > count for part in ranges(given)):
                raise ConfigError(
                    f"{source}: the field 'layers.{number}.{name}' cannot be {show(given)}; "
                    f"the model {traits.name} has {name} 0 to {count - 1}."
                )
