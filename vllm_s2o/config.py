"""Which parameters a model runs with: one YAML file a model, matched, overridden, and told apart by origin."""

import hashlib
import importlib.resources
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_s2o import yaml_file
from vllm_s2o.params import S2OParams, Threshold, threshold_range
from vllm_s2o.yaml_file import ConfigError

__all__ = ["ConfigError", "ModelTraits", "ResolvedConfig", "S2OParams", "load_config"]

ADDITIONAL = '--additional-config "s2o"'
ENVIRONMENT = "VLLM_S2O_CONFIG"

Length = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True)
class ModelTraits:
    """What a config file is matched by."""

    name: str
    """As the user gave it; may be a local path."""
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Match(_Strict):
    """The models a file is for: by name, or by architecture and dimensions, so that a local path works."""

    names: tuple[str, ...] = Field((), description="Model names; the last part of a path counts as a name too.")
    architecture: str | None = Field(None, description="The model's class in its config.json.")
    num_layers: Length | None = Field(None, description="Hidden layers.")
    num_heads: Length | None = Field(None, description="Query heads.")
    num_kv_heads: Length | None = Field(None, description="KV heads.")
    head_size: Length | None = Field(None, description="Size of one head.")

    def by_name(self, traits: ModelTraits) -> bool:
        given = {traits.name.lower(), traits.name.rstrip("/").rpartition("/")[2].lower()}
        return any(given & {name.lower(), name.rpartition("/")[2].lower()} for name in self.names)

    def by_dimensions(self, traits: ModelTraits) -> bool:
        fields = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_size")
        return all(getattr(self, name) == getattr(traits, name) for name in fields)


Range = Annotated[int, Field(ge=0, strict=True)] | Annotated[str, Field(pattern=r"^\d{1,6}-\d{1,6}$")]


class Override(_Strict):
    """A threshold for some layers, or for some query heads of some layers."""

    layers: Range | tuple[Range, ...] = Field(description='Layers of the model: 3, "4-7", or a list of these.')
    heads: Range | tuple[Range, ...] | None = Field(None, description="Query heads of the model, likewise; all if absent.")
    threshold: Threshold | Literal["dense"] = Field(
        description='tau from 0 up to 1, or "dense": the layers run dense attention, or the heads never stop.'
    )


class Provenance(_Strict):
    """Where a file's figures come from."""

    calibrated: bool = Field(False, strict=True, description="Whether the values were searched on this model.")
    source: str = Field("not stated", description="What the values rest on.")
    date: str | None = Field(None, description="When they were found.")
    note: str | None = Field(None, description="Anything a user should know.")


class ConfigFile(_Strict):
    """One file in configs/, or one that a user names."""

    match: Match = Field(Match(), description="The models this file is for.")
    min_seq_len: Length = Field(4096, description="Shorter sequences run dense.")
    min_query_len: Length = Field(256, description="Steps with fewer new tokens of a sequence run dense.")
    params: S2OParams = Field(S2OParams(), description="What every layer runs with, if not overridden.")
    layers: tuple[Override, ...] = Field((), description="Overrides; a later one wins.")
    provenance: Provenance = Field(Provenance(), description="Where the figures come from.")


@dataclass(frozen=True)
class ResolvedConfig:
    """The config of one model, checked against its layers and heads."""

    file: ConfigFile
    traits: ModelTraits
    source: str
    """Name of the file that was started from."""
    matched: str
    """How it was found: name, dimensions, default or path."""
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted field -> where its value came from."""

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

    def layer(self, index: int) -> S2OParams | None:
        """What layer `index` of the model runs with; None where it stays dense."""
        params, dense = self.params, False
        for override in self.file.layers:
            if index not in _numbers(override.layers):
                continue
            if override.heads is None:
                dense = override.threshold == "dense"
                if not dense:
                    params = params.model_copy(update={"threshold": override.threshold})
                continue
            per_head = list(params.thresholds(self.traits.num_heads))
            for head in _numbers(override.heads):
                per_head[head] = 0.0 if override.threshold == "dense" else override.threshold
            params = params.model_copy(update={"threshold": tuple(per_head)})
        return None if dense else params

    def describe(self) -> list[str]:
        """Short lines for a server's log."""
        file, layers = self.file, [self.layer(i) for i in range(self.traits.num_layers)]
        changed = sum(params is not None and params != self.params for params in layers)
        values = "calibrated on this model" if self.calibrated else "not calibrated"
        lines = [
            f"config {self.source} (matched by {self.matched}; {values}: {file.provenance.source})",
            f"threshold={threshold_range(file.params)} segment_len={file.params.segment_len} "
            f"min_seq_len={file.min_seq_len} min_query_len={file.min_query_len} "
            f"layers: {changed} with thresholds of their own, {layers.count(None)} dense",
        ]
        overridden = sorted(name for name, origin in self.origins.items() if origin not in ("default", self.source))
        if overridden:
            lines.append(f"overridden by {ADDITIONAL}: {', '.join(overridden)}")
        if file.params.budget is not None:
            lines.append(f"WARNING: a fixed budget of {file.params.budget:g} replaces the stop rule: for benchmarks only")
        return lines

    def digest(self) -> str:
        """Short hash of everything that changes results."""
        effective = self.file.model_dump(exclude={"match", "provenance"}, mode="json")
        return hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()[:12]


def load_config(
    traits: ModelTraits,
    additional: str | dict | None = None,
    env: str | None = None,
    configs_dir: Any = None,
) -> ResolvedConfig:
    """Find, merge and check the config of a model.

    Args:
        traits: the model.
        additional: "s2o" of vLLM's --additional-config: a path, or fields that override; the field
            "config" among them is a path to start from. Parameters may stand at the top level.
        env: a path, used when `additional` is None.
        configs_dir: directory of the files to match; the shipped ones by default.

    Raises:
        ConfigError: in one sentence, whatever is wrong.
    """
    overrides: dict[str, Any] = {}
    path, named_by = env, ENVIRONMENT
    if additional is not None:
        named_by = ADDITIONAL
        if isinstance(additional, dict):
            overrides = _lift_params(additional)
            path = overrides.pop("config", None)
        else:
            path = additional
        if path is not None and not isinstance(path, str):
            raise ConfigError(f"{named_by} must be the path of a YAML file or an object of fields, got {path!r}.")

    if path is not None:
        fields, source, matched = yaml_file.read(Path(path).expanduser()), str(path), "path"
        _validate(fields, source)
    else:
        fields, source, matched = _find(traits, configs_dir or importlib.resources.files("vllm_s2o.configs"))
    origins = dict.fromkeys(_dotted(ConfigFile().model_dump()), "default")
    origins |= dict.fromkeys(_dotted(fields), source)
    if overrides:
        _validate(overrides, ADDITIONAL)
        origins |= dict.fromkeys(_dotted(overrides), ADDITIONAL)
        params = {**fields.get("params", {}), **overrides.get("params", {})}
        # Overrides of layers come on top of the file's.
        layers = [*fields.get("layers", []), *overrides.get("layers", [])]
        fields = {**fields, **overrides, "params": params, "layers": layers}
    resolved = ResolvedConfig(_validate(fields, source, ADDITIONAL if overrides else None), traits, source, matched, origins)
    _check_layers(resolved, source, len(fields.get("layers", ())) - len(overrides.get("layers", ())))
    return resolved


def _lift_params(given: dict) -> dict[str, Any]:
    """Fields of S2OParams at the top level go to `params`."""
    fields = dict(given)
    params = fields.get("params", {})
    if not isinstance(params, dict):
        return fields  # refused with the rest
    params = dict(params)
    for name in [name for name in fields if name in S2OParams.model_fields]:
        if name in params:
            raise ConfigError(f"{ADDITIONAL}: '{name}' is given twice, at the top level and under 'params'; give it once.")
        params[name] = fields.pop(name)
    return {**fields, "params": params} if params else fields


def _find(traits: ModelTraits, directory) -> tuple[dict[str, Any], str, str]:
    """The shipped file for a model: by name, else by dimensions, else the default."""
    files = {}
    for entry in sorted(directory.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            with importlib.resources.as_file(entry) as path:
                fields = yaml_file.read(path, entry.name)
            files[entry.name] = fields, _validate(fields, entry.name)
    for how, matches in (("name", Match.by_name), ("dimensions", Match.by_dimensions)):
        found = [name for name, (_, file) in files.items() if matches(file.match, traits)]
        if len(found) > 1:
            raise ConfigError(
                f"{' and '.join(found)} both match the model {traits.name} by {how} (field 'match'); "
                f"exactly one may, or name the file to use with --additional-config '{{\"s2o\": \"PATH\"}}'."
            )
        if found:
            return files[found[0]][0], found[0], how
    if "default.yaml" not in files:
        raise ConfigError(f"no config file matches the model {traits.name}, and there is no default.yaml among {sorted(files)}.")
    return files["default.yaml"][0], "default.yaml", "default"


def _validate(fields: dict[str, Any], source: str, extra_source: str | None = None) -> ConfigFile:
    try:
        return ConfigFile.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_sentence(error, source if extra_source is None else f"{source} with {extra_source}")) from None


def _sentence(error: ValidationError, source: str) -> str:
    """pydantic's report as one sentence: the first field, what it got, what is allowed."""
    errors = error.errors()
    first = errors[0]
    # A union reports once per branch, with the branch's name in the location: fields are what the user wrote.
    location = [str(p) for p in first["loc"] if isinstance(p, int) or re.fullmatch(r"[a-z_]+", str(p))]
    location = [p for p in location if p not in ("float", "int", "str", "constrained", "tuple", "literal")]
    where = ".".join(location) or "the file"
    others = len({tuple(map(str, e["loc"][:2])) for e in errors}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(_siblings(first["loc"], source))
        return f"{source}: there is no field '{where}'{more}; allowed here: {allowed}."
    if first["type"] == "missing":
        return f"{source}: the field '{where}' is missing{more}."
    given = json.dumps(first["input"], default=str)
    given = given if len(given) <= 60 else given[:57] + "..."
    # A rule between fields explains itself better than either field's own range.
    allowed = _allowed(first["loc"]) if "multiple of" not in first["msg"] else None
    allowed = allowed or first["msg"].removeprefix("Value error, ")
    return f"{source}: the field '{where}' cannot be {given}{more}; {' '.join(allowed.split())}"


def _walk(location: tuple) -> tuple[type[BaseModel], str | None]:
    """The model that holds the field at a location, and the field's name."""
    models = {"match": Match, "params": S2OParams, "layers": Override, "provenance": Provenance}
    names = [p for p in location if isinstance(p, str)]
    if names and names[0] in models and len(names) > 1:
        return models[names[0]], names[1]
    return ConfigFile, names[0] if names else None


def _siblings(location: tuple, source: str) -> list[str]:
    model = _walk(location)[0]
    names = list(model.model_fields)
    if model is ConfigFile and source == ADDITIONAL:
        names = ["config", *(name for name in names if name not in ("match", "provenance")), *S2OParams.model_fields]
    return names


_ALLOWED = {
    "segment_len": "allowed is a positive multiple of tile_size up to 65536.",
    "tile_size": "allowed are 16, 32, 64 and 128.",
    "key_block": "allowed are 16, 32, 64 and 128.",
    "num_classes": "allowed are 16, 32, 64 and 128.",
    "stop_interval": "allowed is a whole number from 1 to 64.",
    "stop_rule": "allowed are worst_row and mean_row.",
    "query_order": "allowed are position and guide.",
    "budget": "allowed is a number above 0 and up to 1.",
    "min_seq_len": "allowed is a whole number from 1.",
    "min_query_len": "allowed is a whole number from 1.",
    "heads": 'allowed is a number, a range such as "4-7", or a list of these.',
    "calibrated": "allowed are true and false.",
    "layers": "allowed is a list of overrides, each with layers, threshold and, if wanted, heads.",
    "params": "allowed is an object with any of: " + ", ".join(S2OParams.model_fields) + ".",
}


def _allowed(location: tuple) -> str | None:
    model, name = _walk(location)
    if name == "threshold":
        words = ', or "dense".' if model is Override else ", or a list of these, one per query head."
        return f"allowed is a number from 0 up to, but not including, 1{words}"
    if name == "layers" and model is Override:
        return _ALLOWED["heads"]
    return _ALLOWED.get(name or "")


def _dotted(fields: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in fields.items():
        names += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return names


def _numbers(given) -> list[int]:
    """3, "4-7" or a list of these, as numbers."""
    if isinstance(given, tuple):
        return [number for part in given for number in _numbers(part)]
    if isinstance(given, int):
        return [given]
    first, last = map(int, given.split("-"))
    return list(range(first, last + 1))


def _check_layers(config: ResolvedConfig, source: str, from_file: int) -> None:
    """The first `from_file` overrides come from the file, the others from the user."""
    traits, params = config.traits, config.params
    for number, override in enumerate(config.file.layers):
        where = f"{source}: layers.{number}" if number < from_file else f"{ADDITIONAL}: layers.{number - from_file}"
        for name, given, count in (("layers", override.layers, traits.num_layers), ("heads", override.heads, traits.num_heads)):
            numbers = [] if given is None else _numbers(given)
            beyond = [n for n in numbers if n >= count]
            if beyond or (given is not None and not numbers):
                raise ConfigError(
                    f"{where}.{name} names {beyond[0] if beyond else given}, "
                    f"but the model {traits.name} has {name} 0 to {count - 1}."
                )
    if isinstance(params.threshold, tuple) and len(params.threshold) != traits.num_heads:
        raise ConfigError(
            f"{config.source}: params.threshold lists {len(params.threshold)} heads, "
            f"but the model {traits.name} has {traits.num_heads} query heads: give one value, or one per head."
        )
