"""Reading one YAML file that may come from anywhere: small, flat, plain data, or one clear sentence."""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_DEPTH = 20


class ConfigError(ValueError):
    """A configuration that cannot be used: one sentence that names the file, the field and what is allowed."""


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice: YAML would let the last one win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r} in line {node.start_mark.line + 1} must be a word")
            if key in keys[:index]:
                raise ConfigError(f"the field '{key}' stands twice, the second time after line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read(path: Path, name: str | None = None) -> dict[str, Any]:
    """The file's fields. `name` stands for the path in messages.

    Raises:
        ConfigError: missing, unreadable, too large, not UTF-8, not YAML, or more than plain nested data.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file; a path to a YAML config file is expected.") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a directory; a path to a YAML config file is expected.") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}); a readable YAML config file is expected.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES // 2**20} MiB, the most that a config file may be.")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text; a YAML config file is expected.") from None
    try:
        _check_events(text)
        fields = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"{name} is not valid YAML{where}: {' '.join(str(problem).split())}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{name} holds no fields; a config file is a YAML mapping such as 'params: {{threshold: 0.02}}'.")
    return fields


def _check_events(text: str) -> None:
    """Refuse what plain data does not need before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"aliases and anchors are not allowed (line {line}); write the values out")
        tag = getattr(event, "tag", None)
        if tag is not None and not (isinstance(event, yaml.ScalarEvent) and tag == "!" and event.implicit[1]):
            raise ConfigError(f"YAML tags such as '{tag[:40]}' are not allowed (line {line}); plain values are")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels (line {line})")
