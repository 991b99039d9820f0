"""A bad config file in one sentence: which file, which field, what is allowed."""

import itertools
import json
import math
from typing import Any

from pydantic import BaseModel, ValidationError

from vllm_s2o.config_file import ConfigFile, Match, Override, Provenance, Settings
from vllm_s2o.params import NOT_WHOLE_TILES, S2OParams
from vllm_s2o.yaml_file import ConfigError

ADDITIONAL = '--additional-config "s2o"'
"""How messages name vLLM's own channel for a plugin's options."""

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
        "reference_len": f"a whole number from 1 to {2**24}",
        "segment_len": "a positive multiple of tile_size up to 65536",
        **dict.fromkeys(("tile_size", "key_block", "num_classes"), _POWER),
        "stop_interval": "a whole number from 1 to 64",
        "dense_tail": "a whole number from 0 to 65536",
        "ranking": "query_head or kv_head",
        "budget": "a number above 0 and up to 1",
    },
    Override: {"layers": _RANGES, "heads": _RANGES, "threshold": f'{_TAU}, or "dense"'},
    Provenance: {
        "calibrated": "true or false",
        **dict.fromkeys(("source", "date", "note"), "a text"),
        "calibration": "an object, as `vllm-s2o calibrate` writes it",
    },
    ConfigFile: {
        **dict.fromkeys(("min_seq_len", "min_query_len"), _LENGTH),
        "params": f"an object with any of: {', '.join(S2OParams.model_fields)}",
        "layers": "a list of overrides, each with layers, threshold and, if wanted, heads",
        "match": f"an object with any of: {', '.join(Match.model_fields)}",
        "provenance": f"an object with any of: {', '.join(Provenance.model_fields)}",
    },
}
"""The values of each field, as a sentence says them."""

NESTED: dict[str, type[BaseModel]] = {"match": Match, "params": S2OParams, "layers": Override, "provenance": Provenance}
"""Models of the fields that hold further fields."""


class FieldErrors(ConfigError):
    """Fields that cannot be used. As text the first one, and how many more; `every` has a sentence for each."""

    def __init__(self, sentence: str, every: tuple[str, ...]):
        super().__init__(sentence)
        self.every = every


MOST_TOLD = 20
"""Wrong fields that get a sentence each: a file may have tens of thousands."""


def validate(model: type[Settings], fields: dict[str, Any], source: str, partial: bool = False) -> Any:
    """`partial`: what is checked is laid over a file, so that rules between two fields must wait."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = [e for e in error.errors() if not (partial and e["type"] == NOT_WHOLE_TILES)]
        # A field is often missing because its name is misspelt: the unknown one is what the user looks for.
        errors.sort(key=lambda e: e["type"] == "missing")
        if errors:
            raise FieldErrors(_sentence(errors, model, source), _sentences(errors, model, source)) from None


def _place(error: Any) -> tuple:
    """Location of the field that is wrong. What follows it names branches of a union, or an entry of a list."""
    return error["loc"][: 3 if error["loc"][:1] == ("layers",) else 2]


def _sentences(errors: list, model: type[Settings], source: str) -> tuple[str, ...]:
    """One for each of the first fields that are wrong."""
    by_place: dict[tuple, list] = {}
    for error in errors:
        by_place.setdefault(_place(error), []).append(error)
    told = [_sentence(same, model, source) for same in itertools.islice(by_place.values(), MOST_TOLD)]
    others = len(by_place) - len(told)
    return (*told, *([f"{source}: {others} more fields are wrong."] if others else []))


def _sentence(errors: list, model: type[Settings], source: str) -> str:
    """pydantic's report as one sentence: the first field, what it got, what is allowed."""
    place = _place(errors[0])
    # Each branch of a union reports; the one that went into a list knows the entry that is wrong.
    same = [e for e in errors if _place(e) == place]
    entry = next((e for e in same if any(isinstance(p, int) for p in e["loc"][len(place) :])), None)
    error = entry or errors[0]
    parts = [*place, *(p for p in error["loc"][len(place) :] if isinstance(p, int))]
    nested = NESTED.get(place[0]) if isinstance(place[-1], str) and len(place) > 1 else None
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
    return f"{source}: the field {_name(parts)} cannot be {show(error['input'])}; allowed is {allowed}{more}."


def _name(parts: list) -> str:
    """A field's dotted name. Unknown fields are the user's words: on one line, and not endless."""
    name = ".".join(map(str, parts))
    return repr(name if len(name) <= 80 else name[:77] + "...")


def show(given: Any) -> str:
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
