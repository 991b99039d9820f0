"""Tables of a results directory, row by row, with the types that charts need."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT, COUNT, FIGURE = "text", "a whole number from 1", "a number from 0"
MAYBE, SIGNED = "a number from 0, or nothing", "a number, or nothing"
MAYBE_COUNT = "a whole number from 1, or nothing"

FILES: dict[str, dict[str, str]] = {
    "attention.csv": {
        "gpu": TEXT, "torch": TEXT, "triton": TEXT, "vllm": TEXT, "date": TEXT, "commit": TEXT, "provider": TEXT,
        "shape": TEXT, "seq_len": COUNT, "density": MAYBE, "ms_p50": MAYBE, "rel_error": MAYBE, "vs_fa3_paged": MAYBE,
        "vs_fa2": MAYBE, "note": TEXT,
    },
    "frontier.csv": {
        "model": TEXT, "seq_len": COUNT, "split": TEXT, "layer": TEXT, "method": TEXT, "density": FIGURE,
        "rel_error": FIGURE,
    },
    "serving.csv": {
        "gpu": TEXT, "vllm": TEXT, "date": TEXT, "commit": TEXT, "model": TEXT, "backend": TEXT, "tool": TEXT,
        "prompt_len": COUNT, "output_len": COUNT, "concurrency": MAYBE_COUNT, "prompts": COUNT, "ttft_ms_p50": MAYBE,
        "tpot_ms_p50": MAYBE, "tokens_per_s": MAYBE, "density": MAYBE,
    },
    "tasks.csv": {
        "model": TEXT, "backend": TEXT, "task": TEXT, "length": TEXT, "score": FIGURE, "ci95": FIGURE, "density": MAYBE,
        "samples": COUNT, "difference": SIGNED, "difference_low": SIGNED, "difference_high": SIGNED,
    },
}  # fmt: skip
"""The tables that are drawn, and of their columns those that are read. Others may stand beside them."""

MADE_BY = {
    "attention.csv": "make bench-attention", "frontier.csv": "make frontier", "serving.csv": "make bench-serving",
    "tasks.csv": "make tasks",
}  # fmt: skip

Row = Mapping[str, Any]


class ResultsError(RuntimeError):
    """Why a directory's tables cannot be drawn, in one sentence."""


@dataclass(frozen=True)
class Results:
    """What a directory holds."""

    directory: Path
    tables: dict[str, list[Row]] = field(default_factory=dict)
    """Rows by the name of the file."""

    @property
    def missing(self) -> list[str]:
        return [name for name in FILES if name not in self.tables]


def read(directory: Path) -> Results:
    """All known tables of a directory.

    Raises:
        ResultsError: it holds none, or one that cannot be read.
    """
    if not directory.is_dir():
        raise ResultsError(f"There is no directory {directory}.")
    tables = {name: _table(directory / name) for name in FILES if (directory / name).exists()}
    if not tables:
        raise ResultsError(f"{directory} holds none of {', '.join(FILES)}: there is nothing to draw.")
    return Results(directory, tables)


def _table(path: Path) -> list[Row]:
    columns = FILES[path.name]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lacks = [name for name in columns if name not in (reader.fieldnames or ())]
            if lacks:
                raise ResultsError(f"{path} has no column {lacks[0]}: it is no table that {MADE_BY[path.name]} writes.")
            return [_row(path, number, row, columns) for number, row in enumerate(reader, 1)]
    except OSError as error:
        raise ResultsError(f"Cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path} is no CSV file in UTF-8.") from error


def _row(path: Path, number: int, row: Mapping[str, str | None], columns: Mapping[str, str]) -> Row:
    found: dict[str, Any] = {}
    for name, kind in columns.items():
        text = row[name]
        if text is None:
            raise ResultsError(f"{path}, row {number}, is shorter than the line of names.")
        found[name] = text if kind == TEXT else _number(text, kind)
        if found[name] is None and (text or kind not in (MAYBE, SIGNED, MAYBE_COUNT)):
            raise ResultsError(f"{path}, row {number}: '{text[:40]}' in the column {name} is not {kind}.")
    return found


def _number(text: str, kind: str) -> float | int | None:
    try:
        value = int(text) if kind in (COUNT, MAYBE_COUNT) else float(text)
    except ValueError:
        return None
    least = 1 if kind in (COUNT, MAYBE_COUNT) else -math.inf if kind == SIGNED else 0
    return value if math.isfinite(value) and value >= least else None
