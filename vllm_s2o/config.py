"""Which parameters a model runs with: one YAML file a model, matched, overridden, and told apart by origin."""

import datetime
import hashlib
import importlib.resources
import json
import math
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_s2o import yaml_file
from vllm_s2o.params import NOT_WHOLE_TILES, S2OParams, Threshold, threshold_range
from vllm_s2o.yaml_file import ConfigError

__all__ = ["ConfigError", "ModelTraits", "ResolvedConfig", "S2OParams", "load_config"]

ADDITIONAL = '--additional-config "s2o"'
ENVIRONMENT = "VLLM_S2O_CONFIG"


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


# -- what a file holds ------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Length = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]


def _upward(given: str) -> str:
    first, last = map(int, given.split("-"))
    if first > last:
        raise ValueError("a range goes upward")
    return given


Range = (
    Annotated[int, Field(ge=0, strict=True)]
    | Annotated[str, Field(pattern=r"^[0-9]{1,6}-[0-9]{1,6}$"), AfterValidator(_upward)]
)
Ranges = Range | Annotated[tuple[Range, ...], Field(min_length=1)]


def _ranges(given: Any) -> list[range]:
    """3, "4-7" or a tuple of these, as ranges."""
    parts = given if isinstance(given, tuple) else (given,)
    bounds = [(part, part) if isinstance(part, int) else map(int, part.split("-")) for part in parts]
    return [range(first, last + 1) for first, last in bounds]


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


class Match(_Strict):
    """The models a file is for: by name, or by architecture and dimensions, so that a local path works."""

    names: tuple[str, ...] = Field((), description="Model names; the last part of a path counts as a name too.")
    architecture: str | None = Field(None, description="The model's class in its config.json.")
    num_layers: Length | None = Field(None, description="Hidden layers.")
    num_heads: Length | None = Field(None, description="Query heads.")
    num_kv_heads: Length | None = Field(None, description="KV heads.")
    head_size: Length | None = Field(None, description="Size of one head.")

    def by_name(self, traits: ModelTraits) -> bool:
        return traits.name.lower() in [name.lower() for name in self.names]

    def by_last_part(self, traits: ModelTraits) -> bool:
        return _last_part(traits.name) in [_last_part(name) for name in self.names]

    def by_dimensions(self, traits: ModelTraits) -> bool:
        fields = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_size")
        return all(getattr(self, name) == getattr(traits, name) for name in fields)


class Override(_Strict):
    """A threshold for some layers, or for some query heads of some layers."""

    layers: Ranges = Field(description='Layers of the model: 3, "4-7", or a list of these.')
    heads: Ranges | None = Field(None, description="Query heads of the model, likewise; all if absent.")
    threshold: Threshold | Literal["dense"] = Field(
        description='tau from 0 up to 1, or "dense": the layers run dense attention, or the heads never stop.'
    )


# YAML reads a bare 2026-01-31 as a date.
_Date = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, datetime.date) else given)]


class Provenance(_Strict):
    """Where a file's figures come from."""

    calibrated: bool = Field(False, strict=True, description="Whether the values were searched on this model.")
    source: str = Field("not stated", description="What the values rest on.")
    date: _Date | None = Field(None, description="When they were found.")
    note: str | None = Field(None, description="Anything a user should know.")

    def __str__(self) -> str:
        return ", ".join(text for text in (self.source, self.date, self.note) if text)


class Settings(_Strict):
    """What a file and a user alike can set."""

    min_seq_len: Length = Field(4096, description="Shorter sequences run dense.")
    min_query_len: Length = Field(256, description="Steps with fewer new tokens of a sequence run dense.")
    params: S2OParams = Field(S2OParams(), description="What every layer runs with, if not overridden.")
    layers: tuple[Override, ...] = Field((), description="Overrides; a later one wins.")


class ConfigFile(Settings):
    """One file in configs/, or one that a user names."""

    match: Match = Field(Match(), description="The models this file is for.")
    provenance: Provenance = Field(Provenance(), description="Where the figures come from.")


# -- what a model gets ------------------------------------------------------------------------------------------------

_FOUND = {
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
    matched: Literal["name", "dimensions", "default", "path"]
    """How it was found."""
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

    @property
    def provenance(self) -> str:
        return str(self.file.provenance)

    def layer(self, index: int) -> S2OParams | None:
        """What layer `index` of the model runs with; None where it stays dense."""
        params, dense = self.params, False
        for override in self.file.layers:
            if not any(index in layers for layers in _ranges(override.layers)):
                continue
            never_stops = override.threshold == "dense"
            threshold: Any = 0.0 if never_stops else override.threshold
            if override.heads is None:
                dense = never_stops
            else:
                # Heads that get a threshold in a dense layer make it sparse; its other heads never stop.
                dense = dense and never_stops
                per_head = list(params.thresholds(self.traits.num_heads))
                for heads in _ranges(override.heads):
                    per_head[heads.start : heads.stop] = [threshold] * len(heads)
                threshold = tuple(per_head)
            params = params.model_copy(update={"threshold": threshold})
        return None if dense else params

    def describe(self) -> list[str]:
        """Short lines for a server's log."""
        params, layers = self.params, [self.layer(i) for i in range(self.traits.num_layers)]
        sparse = [layer for layer in layers if layer is not None]
        changed = sum(layer != params for layer in sparse)
        values = "calibrated" if self.calibrated else "not calibrated"
        stop = f"threshold={threshold_range(sparse or [params])}"
        if params.budget is not None:
            stop = f"budget={params.budget:g} (WARNING: no stop rule, for benchmarks only)"
        lines = [
            f"config {self.source} ({_FOUND[self.matched]}; {values}: {self.provenance})",
            f"{stop} segment_len={params.segment_len} "
            f"min_seq_len={self.min_seq_len} min_query_len={self.min_query_len} "
            f"layers: {changed} with thresholds of their own, {layers.count(None)} dense",
        ]
        overridden = sorted(name for name, origin in self.origins.items() if ADDITIONAL in origin)
        if overridden:
            lines.append(f"overridden by {ADDITIONAL}: {', '.join(overridden)}")
        return lines

    def digest(self) -> str:
        """Short hash of everything that changes results, and of nothing else."""
        layers = [self.params, *(self.layer(i) for i in range(self.traits.num_layers))]
        effective = [self.min_seq_len, self.min_query_len, *(layer and layer.model_dump() for layer in layers)]
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
        env: a path, used when `additional` is None.
        configs_dir: directory of the files to match; the shipped ones by default.

    Raises:
        ConfigError: in one sentence, whatever is wrong.
    """
    try:
        return _load(traits, additional, env, configs_dir or importlib.resources.files("vllm_s2o.configs"))
    except ConfigError as error:  # a path may hold a line break; the sentence stays one line
        raise ConfigError(" ".join(str(error).split())) from None


def _load(traits: ModelTraits, additional: Any, env: str | None, directory: Path | Traversable) -> ResolvedConfig:
    overrides: dict[str, Any] = {}
    path, named_by = (env, ENVIRONMENT) if additional is None else (additional, ADDITIONAL)
    if isinstance(additional, dict):
        overrides = _lift_params(additional)
        path, named_by = overrides.pop("config", None), f"{ADDITIONAL}: the field 'config'"
    if path is None:
        fields, source, matched = _find(traits, directory)
    else:
        fields, source, matched = _read_path(path, named_by), str(path), "path"
    file = _validate(ConfigFile, fields, source)
    origins = dict.fromkeys(_dotted(ConfigFile().model_dump()), "default")
    origins |= dict.fromkeys(_dotted(fields), source)
    from_file = len(file.layers)
    if overrides:
        _validate(Settings, overrides, ADDITIONAL, partial=True)
        origins |= dict.fromkeys(_dotted(overrides), ADDITIONAL)
        merged = {**fields, **overrides, "params": {**fields.get("params", {}), **overrides.get("params", {})}}
        if from_file and overrides.get("layers"):  # the user's overrides come on top of the file's
            merged["layers"] = [*fields["layers"], *overrides["layers"]]
            origins["layers"] = f"{source}, {ADDITIONAL}"
        elif from_file:
            merged["layers"], origins["layers"] = fields["layers"], source
        file = _validate(ConfigFile, merged, f"{source} with {ADDITIONAL}")
    resolved = ResolvedConfig(file, traits, source, matched, origins)
    _check_heads_and_layers(resolved, from_file)
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
            raise ConfigError(f"{ADDITIONAL}: '{name}' stands twice, at the top level and in 'params'; give it once.")
        params[name] = fields.pop(name)
    return {**fields, "params": params} if params else fields


def _read_path(given: Any, named_by: str) -> dict[str, Any]:
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        also = ", or an object of fields" if named_by == ADDITIONAL else ""
        raise ConfigError(f"{named_by} cannot be {_show(given)}; allowed is the path of a YAML config file{also}.")
    try:
        path = Path(given).expanduser()
    except RuntimeError:  # a user's home that does not exist
        path = Path(given)
    return yaml_file.read(path, f"{given} (named by {named_by.partition(':')[0]})")


def _find(traits: ModelTraits, directory: Path | Traversable) -> tuple[dict[str, Any], str, str]:
    """The shipped file for a model: by name, else by dimensions, else the default."""
    fields, matches = {}, {}
    for entry in sorted(directory.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            with importlib.resources.as_file(entry) as path:
                fields[entry.name] = yaml_file.read(path, entry.name)
            matches[entry.name] = _validate(ConfigFile, fields[entry.name], entry.name).match
    ranks = (("name", Match.by_name), ("name", Match.by_last_part), ("dimensions", Match.by_dimensions))
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


def _check_heads_and_layers(config: ResolvedConfig, from_file: int) -> None:
    """The first `from_file` overrides come from the file, the others from the user."""
    traits, threshold = config.traits, config.params.threshold
    if isinstance(threshold, tuple) and len(threshold) != traits.num_heads:
        raise ConfigError(
            f"{config.origins['params.threshold']}: the field 'params.threshold' lists {len(threshold)} heads, "
            f"but the model {traits.name} has {traits.num_heads}; allowed is one value, or one per query head."
        )
    for number, override in enumerate(config.file.layers):
        where = f"{config.source}: the field 'layers.{number}"
        if number >= from_file:
            where = f"{ADDITIONAL}: the field 'layers.{number - from_file}"
        for name, count in (("layers", traits.num_layers), ("heads", traits.num_heads)):
            given = getattr(override, name)
            if given is not None and any(part.stop > count for part in _ranges(given)):
                raise ConfigError(
                    f"{where}.{name}' cannot be {_show(given)}; the model {traits.name} has {name} 0 to {count - 1}."
                )


# -- what is said of a bad one ----------------------------------------------------------------------------------------

_LENGTH = f"a whole number from 1 to {2**31 - 1}"
_POWER = "16, 32, 64 or 128"
_RANGES = 'a whole number, a range such as "4-7", or a list of these'
_TAU = "a number from 0 up to, but not including, 1"

ALLOWED: dict[type[BaseModel], dict[str, str]] = {
    Match: {
        "names": "a list of model names",
        "architecture": "the name of a model class",
        **dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "head_size"), _LENGTH),
    },
    S2OParams: {
        "threshold": f"{_TAU}, or a list of these, one per query head",
        "segment_len": "a positive multiple of tile_size up to 65536",
        **dict.fromkeys(("tile_size", "key_block", "num_classes"), _POWER),
        "stop_interval": "a whole number from 1 to 64",
        "stop_rule": "worst_row or mean_row",
        "query_order": "position or guide",
        "budget": "a number above 0 and up to 1",
    },
    Override: {"layers": _RANGES, "heads": _RANGES, "threshold": f'{_TAU}, or "dense"'},
    Provenance: {"calibrated": "true or false", **dict.fromkeys(("source", "date", "note"), "a text")},
    ConfigFile: {
        **dict.fromkeys(("min_seq_len", "min_query_len"), _LENGTH),
        "params": f"an object with any of: {', '.join(S2OParams.model_fields)}",
        "layers": "a list of overrides, each with layers, threshold and, if wanted, heads",
        "match": f"an object with any of: {', '.join(Match.model_fields)}",
        "provenance": f"an object with any of: {', '.join(Provenance.model_fields)}",
    },
}
"""The values of each field, as a sentence says them."""

_NESTED = {"match": Match, "params": S2OParams, "layers": Override, "provenance": Provenance}


def _validate(model: type[Settings], fields: dict[str, Any], source: str, partial: bool = False) -> Any:
    """`partial`: what is checked is laid over a file, so that rules between two fields must wait."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = [e for e in error.errors() if not (partial and e["type"] == NOT_WHOLE_TILES)]
        if errors:
            raise ConfigError(_sentence(errors, model, source)) from None


def _place(error: Any) -> tuple:
    """Location of the field that is wrong. What follows it names branches of a union, or an entry of a list."""
    return error["loc"][: 3 if error["loc"][:1] == ("layers",) else 2]


def _sentence(errors: list, model: type[Settings], source: str) -> str:
    """pydantic's report as one sentence: the first field, what it got, what is allowed."""
    place = _place(errors[0])
    # Each branch of a union reports; the one that went into a list knows the entry that is wrong.
    same = [e for e in errors if _place(e) == place]
    entry = next((e for e in same if any(isinstance(p, int) for p in e["loc"][len(place) :])), None)
    error = entry or errors[0]
    parts = [*place, *(p for p in error["loc"][len(place) :] if isinstance(p, int))]
    nested = _NESTED.get(place[0]) if isinstance(place[-1], str) and len(place) > 1 else None
    others = len({_place(e) for e in errors}) - 1
    more = f" (and {others} more wrong)" if others else ""

    if error["type"] in ("extra_forbidden", "invalid_key"):
        names = list((nested or model).model_fields)
        if nested is None and model is Settings:
            names = ["config", *names, *S2OParams.model_fields]
        return f"{source}: there is no field {_name(parts)}; allowed are {', '.join(names)}{more}."
    if error["type"] == NOT_WHOLE_TILES:
        given, tile_size = error["ctx"]["segment_len"], error["ctx"]["tile_size"]
        allowed = f"a positive multiple of tile_size={tile_size} up to 65536"
        return f"{source}: the field 'params.segment_len' cannot be {given}; allowed is {allowed}{more}."
    allowed = ALLOWED[nested][place[-1]] if nested else ALLOWED[ConfigFile][place[0]]
    if error["type"] == "missing":
        return f"{source}: the field {_name(parts)} is missing; allowed is {allowed}{more}."
    return f"{source}: the field {_name(parts)} cannot be {_show(error['input'])}; allowed is {allowed}{more}."


def _name(parts: list) -> str:
    """A field's dotted name. Unknown fields are the user's words: on one line, and not endless."""
    name = ".".join(map(str, parts))
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _show(given: Any) -> str:
    """A value as JSON, cut short; for a number given as a text, how to write it: YAML reads 1e-3 as a text."""
    try:
        text = json.dumps(given, default=str)
    except (ValueError, TypeError, RecursionError):
        return "a value too long to show"
    text = text if len(text) <= 60 else text[:57] + "..."
    try:
        number = abs(float(given)) if isinstance(given, str) else math.nan
    except ValueError:
        return text
    if number == 0 or 1e-9 <= number < 1e9:
        return f"the text {text} (write {format(float(given), '.12f').rstrip('0').rstrip('.')})"
    return text
