"""What is measured of a model layer by layer, in a file that grows: work that was cut off goes on from there."""

import json
from pathlib import Path
from typing import Any


class PartsError(RuntimeError):
    """Why a file of parts cannot be used, in one sentence."""


class Parts:
    """The sweeps that are done, in a file that grows by a line for each text and layer.

    The first line holds the settings, which must not change, though fewer methods may be asked for; a last line that
    was cut off is dropped.

    Raises:
        PartsError: the file holds something else, or sweeps with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        settings = json.loads(json.dumps(settings))  # as they will be read: tuples become lists
        try:
            whole = path.read_bytes() if path.exists() else b""
            whole = whole[: whole.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            for part in lines[1:]:
                self.done[part["text"], part["layer"]] = part["methods"]
            found = dict(lines[0]["settings"]) if lines else settings
        except OSError as error:
            raise PartsError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PartsError(f"{path} holds no sweeps: remove it, or name another --out.") from error
        for name, value in settings.items():
            if isinstance(value, dict):
                found[name] = {key: other for key, other in found[name].items() if key in value}
            if found.get(name) != value:
                raise PartsError(f"The sweeps in {path} have other {name}: remove it, or name another --out.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)
            if not lines:
                self._append({"settings": settings})
        except OSError as error:
            raise PartsError(f"Cannot write {path}: {error.strerror}.") from error

    def add(self, text: str, layer: int, methods: dict[str, Any]) -> None:
        """methods: what `sweep` returns, with lists."""
        self._append({"text": text, "layer": layer, "methods": methods})
        self.done[text, layer] = methods

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def as_lists(swept: dict[str, dict]) -> dict[str, dict]:
    """What `sweep` returns, to five digits: more would be noise, and most of the file."""
    return {
        name: {figure: [[float(f"{x:.5g}") for x in row] for row in rows.tolist()] for figure, rows in figures.items()}
        for name, figures in swept.items()
    }
