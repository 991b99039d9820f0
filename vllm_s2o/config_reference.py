"""Every field of a config file in words: what the command line explains and the documentation lists.

All of it comes from the pydantic models and from the sentences on bad values; nothing is described a second time.
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined

from vllm_s2o.config_errors import ALLOWED, NESTED
from vllm_s2o.config_file import ConfigFile
from vllm_s2o.params import S2OParams
from vllm_s2o.yaml_file import ConfigError

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "object",
    "null": "null",
}
"""What a user calls the types of a JSON schema."""


@dataclass(frozen=True)
class Field:
    """One field as a user sees it."""

    name: str
    """Dotted, as messages name it; the fields of an entry of a list have no number: layers.heads."""
    meaning: str
    type: str
    allowed: str
    required: bool
    default: Any
    """In plain JSON; None for a required field too."""


def fields() -> list[Field]:
    """All fields, those that hold others before what they hold."""
    found = []
    for name in ConfigFile.model_fields:
        found.append(_field(ConfigFile, name, ""))
        nested = NESTED.get(name)
        if nested is not None:
            found += [_field(nested, inner, f"{name}.") for inner in nested.model_fields]
    return found


def field(name: str) -> Field:
    """By its dotted name, with the number of a list's entry or without; a field of `params` by its own name too.

    Raises:
        ConfigError: there is no such field.
    """
    known = {field.name: field for field in fields()}
    plain = ".".join(part for part in name.split(".") if not part.isdigit())
    # As in --additional-config, where fields of `params` may stand at the top level.
    found = known.get(plain) or known.get(f"params.{plain}")
    if found is None:
        names = [name for name in known if not name.startswith("params.")] + list(S2OParams.model_fields)
        raise ConfigError(f"there is no field {_short(name)!r}; allowed are {', '.join(names)}.")
    return found


def markdown() -> str:
    """The page docs/config.md; `make docs` writes it."""
    lines = [
        "# Config reference",
        "",
        "Written by `make docs` from the models in `vllm_s2o/`: the same words as `vllm-s2o config explain`. How a",
        "file is found, and how options lie over it, is told in the README; which values to choose, in `tuning.md`.",
        "",
        "| field | type | allowed | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for one in fields():
        default = "(required)" if one.required else f"`{json.dumps(one.default)}`"
        cells = (f"`{one.name}`", one.type, one.allowed, default, one.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."


def _field(model: Any, name: str, prefix: str) -> Field:
    info, schema = model.model_fields[name], model.model_json_schema()
    given = info.default is not PydanticUndefined
    types = _type(schema["properties"][name], schema.get("$defs", {}))
    return Field(
        name=prefix + name,
        meaning=info.description or "",
        type=types,
        # Sentences on bad values leave null out: it is the default, which nobody writes.
        allowed=ALLOWED[model][name] + (", or null" if "null" in types.split() else ""),
        required=not given,
        default=_plain(info.default) if given else None,
    )


def _plain(default: Any) -> Any:
    """As JSON has it. An object's default is that each of its fields has its own."""
    if hasattr(default, "model_dump"):
        return {}
    return list(default) if isinstance(default, tuple) else default


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """`number or list`: the types of all branches, each once."""
    words: list[str] = []

    def collect(part: dict[str, Any]) -> None:
        if "$ref" in part:
            collect(definitions[part["$ref"].rpartition("/")[2]])
        elif "anyOf" in part:
            for branch in part["anyOf"]:
                collect(branch)
        else:
            given = part.get("type") or _type_of(part)
            word = _TYPES[given]
            if given == "array" and (entries := _type(part["items"], definitions)):
                # A word that a union repeats is enough once: "list of whole numbers or texts".
                word = f"list of {entries.replace(' or ', 's or ')}s"
            if word not in words:
                words.append(word)

    collect(schema)
    return " or ".join(words)


def _type_of(part: dict[str, Any]) -> str:
    """Of a literal's schema, which may list values alone."""
    values = part.get("enum") or [part["const"]]
    return "string" if isinstance(values[0], str) else "integer"


if __name__ == "__main__":
    print(markdown(), end="")
