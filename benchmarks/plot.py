#!/usr/bin/env python3
"""Pictures of the results: time and speed-up against length, error against density.

    python benchmarks/plot.py benchmarks/results/attention.csv [MORE.csv ...] --out benchmarks/results/attention.png
                              [--shape SHAPE]

A picture shows one shape, by default that of S2O's first row: a line through made and captured inputs, or through
several layers, would join what does not belong together.
"""

import argparse
import csv
from pathlib import Path

LABELS = {
    "s2o": "S2O", "s2o_kv_head": "S2O, a ranking per KV head", "fa3_paged": "FA3, pages", "fa3": "FA3", "fa2": "FA2",
    "pbs": "PBS-Attn", "flashprefill": "FlashPrefill", "flashprefill2": "FlashPrefill V2", "flexprefill": "FlexPrefill",
}  # fmt: skip
OURS = ("s2o", "s2o_kv_head")
"""The first of which there are rows is drawn."""
COLOURS = {"s2o": "#d1495b", "fa3_paged": "#00798c", "fa3": "#66a5ad", "fa2": "#8d96a3"}
COLOURS |= {"pbs": "#edae49", "flashprefill": "#7768ae", "flashprefill2": "#3f3351", "flexprefill": "#5fad56"}
PEERS = ("pbs", "flashprefill", "flashprefill2", "flexprefill")


def read(paths: list[Path]) -> list[dict[str, str]]:
    """Rows with figures; a row without says why a provider could not run."""
    rows = [row for path in paths for row in csv.DictReader(path.open(newline=""))]
    return [row for row in rows if row["ms_p50"]]


def latest(rows: list[dict[str, str]], provider: str) -> list[dict[str, str]]:
    """A provider's rows by length; where several runs measured one point, the last."""
    points: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["provider"] == provider:
            points[int(row["seq_len"]), round(-float(row["density"]), 2), row["note"]] = row
    return [points[at] for at in sorted(points)]


def lines(rows: list[dict[str, str]], provider: str, column: str) -> tuple[list[int], list[float]]:
    """Length and figure of a dense provider."""
    points = latest(rows, provider)
    return [int(row["seq_len"]) for row in points], [float(row[column]) for row in points]


def draw(rows: list[dict[str, str]], mine: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, speed, error) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    ours, label = latest(rows, mine), LABELS[mine]
    lengths = sorted({int(row["seq_len"]) for row in rows})
    for provider in ("fa2", "fa3", "fa3_paged"):
        if latest(rows, provider):
            time.plot(*lines(rows, provider, "ms_p50"), "o-", color=COLOURS[provider], label=LABELS[provider])
    x = [int(row["seq_len"]) for row in ours]
    time.plot(x, [float(row["ms_p50"]) for row in ours], "o", color=COLOURS["s2o"], label=label)
    for name in ("fa3_paged", "fa2"):
        beside = [row for row in ours if row[f"vs_{name}"]]  # where that kernel ran
        if not beside:
            continue
        times = [float(row[f"vs_{name}"]) for row in beside]
        at = [int(row["seq_len"]) for row in beside]
        speed.plot(at, times, "o", color=COLOURS[name], label=f"against {LABELS[name]}")
    by_density = sorted(ours, key=lambda row: float(row["density"]))
    for row in ours:
        share = f"{float(row['density']):.0%}"
        for axes, column in ((time, "ms_p50"), (speed, "vs_fa3_paged")):
            if not row[column]:
                continue
            point = (float(row["seq_len"]), float(row[column]))
            axes.annotate(share, point, xytext=(6, -3), textcoords="offset points", fontsize=8, color=COLOURS["s2o"])
        point = (float(row["density"]), float(row["rel_error"]))
        error.plot(*point, "o", color=COLOURS["s2o"])
        name = f"{int(row['seq_len']) // 1024}K"
        apart = (0, 6 if by_density.index(row) % 2 else -14)  # neighbours lie close
        error.annotate(name, point, xytext=apart, textcoords="offset points", fontsize=8, ha="center")
    for provider in PEERS:
        if not (theirs := latest(rows, provider)):
            continue
        look = dict(color=COLOURS[provider], label=LABELS[provider])
        time.plot([int(r["seq_len"]) for r in theirs], [float(r["ms_p50"]) for r in theirs], "x", **look)
        error.plot([float(r["density"]) for r in theirs], [float(r["rel_error"]) for r in theirs], "x", **look)
    for axes, title in ((time, "One layer's attention, ms (S2O: density)"), (speed, "S2O is faster by (density)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
        axes.set_xlabel("prompt length, tokens")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    time.set_yscale("log")
    speed.set_ylim(bottom=0)
    error.set_xlim(0, 1)
    error.set_yscale("log")
    error.set_xlabel("density: visited / causal pairs")
    error.set_title("Relative error (mean squares), marks as on the left", fontsize=10)
    for axes in (time, speed, error):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    row = ours[0]
    dtype = "" if "fp8" in row["shape"] else ", bf16"
    made = f"{row['gpu']}, {row['shape']}{dtype}, torch {row['torch']}, Triton {row['triton']}, vLLM {row['vllm']}"
    dates = sorted({row["date"] for row in rows})
    figure.suptitle(f"{made}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files written by attention.py")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--shape", help="what the column `shape` says of the rows to draw")
    options = parser.parse_args()
    missing = [str(path) for path in options.results if not path.is_file()]
    if missing:
        parser.error(f"no such results file: {', '.join(missing)}")
    rows = read(options.results)
    mine = next((name for name in OURS if any(row["provider"] == name for row in rows)), OURS[0])
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["provider"] == mine))
    if not shapes:
        parser.error("the results hold no row of s2o: there is nothing to draw")
    shape = options.shape or shapes[0]
    if shape not in shapes:
        parser.error(f"the results hold no row of {mine} for the shape '{shape}', only for: {'; '.join(shapes)}")
    draw([row for row in rows if row["shape"] == shape], mine, options.out)


if __name__ == "__main__":
    main()
