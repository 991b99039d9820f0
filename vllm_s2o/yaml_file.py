"""Reading one YAML file that may come from anywhere: small, flat, plain data, or one clear sentence."""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
"""A config with an override for every layer of the largest models takes a tenth of it."""
MAX_DEPTH = 20
MAX_VALUES = 2**16
"""Keys and values; an override for every KV head of every layer of the largest models takes a quarter of it."""
MAX_PLAIN = 2**13
"""Characters of a value without quotes, which may be read as a number: YAML's numbers to the base of 60 take the square
of their length."""

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may have been built without libyaml


class ConfigError(ValueError):
    """A configuration that cannot be used: one sentence that names the file, the field and what is allowed."""


class _Loader(_Base):
    """Safe loading that refuses a key given twice: YAML would let the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        line, seen = node.start_mark.line + 1, set[str]()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r} in line {line} must be a word")
            if key in seen:
                raise ConfigError(f"the field '{key}' stands twice, the second time after line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(path: Path, name: str | None = None) -> dict[str, Any]:
    """The file's fields. `name` stands for the path in messages.

    Raises:
        ConfigError: missing, unreadable, too large, not UTF-8, not YAML, or more than plain nested data.
    """
    name = name or str(path)
    data = _bytes(path, name)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES // 2**10} KiB, the most that a config file may be.")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text; a YAML config file is expected.") from None
    try:
        _check_events(text)
        fields = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}.") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"{name} is not valid YAML{where}: {' '.join(str(problem).split())}.") from None
    if not isinstance(fields, dict):
        example = "'params: {threshold: 0.02}'"
        kind = "holds no fields" if fields is None else "is a list" if isinstance(fields, list) else "is a single value"
        raise ConfigError(f"{name} {kind}; a config file is a YAML mapping such as {example}.")
    return fields


def _bytes(path: Path, name: str) -> bytes:
    try:
        # Without waiting: opening a pipe that nobody writes to would hang the start.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file.read(MAX_BYTES + 1)
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ConfigError(f"{name} is {kind}; a path to a YAML config file is expected.")
    except FileNotFoundError:
        # A server may have been started in another directory than its user thinks of.
        looked = "" if str(path.absolute()) in name else f" (looked for {path.absolute()})"
        raise ConfigError(f"{name}: there is no such file{looked}; a path to a YAML config file is expected.") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a directory; a path to a YAML config file is expected.") from None
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"{name} cannot be read ({reason}); a readable YAML config file is expected.") from None


def _check_events(text: str) -> None:
    """Refuse what plain data does not need before anything is built from it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, _Base)):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if count > MAX_VALUES:
            raise ConfigError(f"more than {MAX_VALUES} values (line {line})")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"aliases and anchors are not allowed (line {line}); write the values out")
        tag = getattr(event, "tag", None)
        if tag is not None and not (isinstance(event, yaml.ScalarEvent) and tag == "!" and event.implicit[1]):
            raise ConfigError(f"YAML tags such as '{tag[:40]}' are not allowed (line {line}); plain values are")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > MAX_PLAIN:
            raise ConfigError(f"a value of more than {MAX_PLAIN} characters (line {line}) must stand in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels (line {line})")
