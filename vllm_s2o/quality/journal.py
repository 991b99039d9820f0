"""A file that grows by a line for each thing that is done: work that was cut off goes on from there."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class JournalError(RuntimeError):
    """Why a file cannot be used, in one sentence."""


class Journal:
    """What was done under some settings.

    The first line holds the settings, which must not change; of one that is a table, fewer entries may be asked for. A
    last line that was cut off is dropped.

    Args:
        path: the file; it and its folder are made if they are missing.
        settings: what every line depends on.
        holds: what a user calls the lines, in the plural.
        take: reads a line that was done before.

    Raises:
        JournalError: the file holds something else, or was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], holds: str, take: Callable[[dict[str, Any]], None]):
        self.path = path
        settings = json.loads(json.dumps(settings))  # as they will be read: tuples become lists
        try:
            whole = path.read_bytes() if path.exists() else b""
            whole = whole[: whole.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            for line in lines[1:]:
                take(line)
            found = dict(lines[0]["settings"]) if lines else dict(settings)
            for name, value in settings.items():
                if isinstance(value, dict):
                    found[name] = {key: other for key, other in found[name].items() if key in value}
        except OSError as error:
            raise JournalError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(f"{path} holds no {holds}: remove it, or name another --out.") from error
        for name in {**settings, **found}:
            if found.get(name) != settings.get(name):
                raise JournalError(f"The {holds} in {path} have other {name}: remove it, or name another --out.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)
        except OSError as error:
            raise JournalError(f"Cannot write {path}: {error.strerror}.") from error
        if not lines:
            self.append([{"settings": settings}])

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines, all of them or, where this is cut off, the first ones."""
        try:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise JournalError(f"Cannot write {self.path}: {error.strerror}.") from error
