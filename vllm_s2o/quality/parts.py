"""What is measured of a model layer by layer, in a file that grows."""

from pathlib import Path
from typing import Any

from .journal import Journal


class Parts:
    """The sweeps that are done, a line for each text and layer.

    Fewer methods may be asked for than the file has.

    Raises:
        JournalError: as `Journal` does.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.done: dict[tuple[str, int], dict[str, Any]] = {}
        self._journal = Journal(path, settings, "sweeps", self._take)

    def add(self, text: str, layer: int, methods: dict[str, Any]) -> None:
        """methods: what `sweep` returns, with lists."""
        line = {"text": text, "layer": layer, "methods": methods}
        self._journal.append([line])
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self.done[line["text"], line["layer"]] = line["methods"]


def as_lists(swept: dict[str, dict]) -> dict[str, dict]:
    """What `sweep` returns, to five digits: more would be noise, and most of the file."""
    return {
        name: {figure: [[float(f"{x:.5g}") for x in row] for row in rows.tolist()] for figure, rows in figures.items()}
        for name, figures in swept.items()
    }
