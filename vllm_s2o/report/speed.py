"""What was timed: one layer's attention, and whole servers."""

from collections.abc import Sequence
from typing import Any

from . import axes
from .chart import Point, Series, chart
from .markup import Markup, el, folded, joined, table
from .results import Row
from .words import LOOK_OF, conditions, error, figure, look_of, name_of, noted, ours, percent, ratio

DENSE = ("fa3_paged", "fa3", "fa2")

# -- attention --------------------------------------------------------------------------------------------------------


def attention(rows: Sequence[Row]) -> Markup:
    """One layer's attention: time and error. Charts hold one GPU and shape, S2O's first ones; tables have all."""
    ran = [row for row in rows if row["ms_p50"]]
    first = next((row for row in ran if ours(row["provider"])), ran[0] if ran else None)
    mine = [row for row in ran if first and (row["gpu"], row["shape"]) == (first["gpu"], first["shape"])]
    drawn = [draw(mine, mine[0]["shape"]) for draw in (_times, _errors) if mine]
    speeds = [
        _speeds([row for row in ran if row["gpu"] == gpu], provider, gpu)
        for gpu in dict.fromkeys(row["gpu"] for row in ran)
        for provider in filter(ours, _providers(ran))
    ]
    return joined(
        (
            el("h3", "One layer's attention"),
            el("p", conditions(rows, ("gpu", "torch", "triton", "vllm", "date", "commit")), class_="soft"),
            el("div", *drawn, class_="charts"),
            *speeds,
            folded(f"All {len(rows)} rows of attention.csv", _attention_rows(rows)),
        )
    )


def _times(rows: Sequence[Row], shape: str) -> Markup:
    # FA3 off pages is hardly faster: its line would lie on that of FA3 on pages.
    shown = [row for row in rows if row["provider"] != "fa3" or not any(r["provider"] == "fa3_paged" for r in rows)]
    series = []
    for provider in _providers(shown):
        points = [
            Point(
                row["seq_len"], row["ms_p50"], percent(row["density"]) if ours(provider) else "",
                f"{name_of(provider)}, {row['seq_len']:,} tokens: {row['ms_p50']:.4g} ms at a density of "
                f"{percent(row['density'])}{noted(row)}",
            )
            for row in _once(shown, provider)
        ]  # fmt: skip
        series.append(Series(name_of(provider), points, look_of(provider), line=provider in DENSE))
    return chart(
        "Time against length", "Milliseconds of one layer's attention by prompt length, for each provider.",
        axes.lengths("prompt length, tokens", [row["seq_len"] for row in shown]),
        axes.decades("time", [row["ms_p50"] for row in shown], "ms"), series,
        f"{shape}; labels are S2O's density. Lower is faster.",
    )  # fmt: skip


def _errors(rows: Sequence[Row], shape: str) -> Markup | None:
    """Sparse providers only: dense ones differ by rounding."""
    sparse = [row for row in rows if row["provider"] not in DENSE and row["density"] and row["rel_error"]]
    if not sparse:
        return None
    series = []
    for provider in _providers(sparse):
        points = [
            Point(
                row["density"], row["rel_error"], axes.tokens(row["seq_len"]),
                f"{name_of(provider)}, {row['seq_len']:,} tokens: relative error {row['rel_error']:.2g} at a density "
                f"of {percent(row['density'])}{noted(row)}",
            )
            for row in _once(sparse, provider)
        ]  # fmt: skip
        series.append(Series(name_of(provider), points, look_of(provider), line=False))
    return chart(
        "Error against density", "Relative error of sparse attention by density, for each sparse provider.",
        axes.shares("density: visited / causal pairs", [row["density"] for row in sparse]),
        axes.decades("relative error", [row["rel_error"] for row in sparse]), series,
        f"{shape}; labels are lengths. Lower left is better.",
    )  # fmt: skip


def _speeds(rows: Sequence[Row], provider: str, gpu: str) -> Markup | None:
    """S2O against dense kernels of the same run; made inputs, which stand first in the table, before captured ones."""
    shapes = dict.fromkeys(row["shape"] for row in rows)
    mine = [row for shape in shapes for row in _once([r for r in rows if r["shape"] == shape], provider)]
    columns = ("shape", "tokens", "density", "S2O, ms", "against FA3 on pages", "against FA2", "relative error")
    cells = [
        (
            row["shape"], f"{row['seq_len']:,}", percent(row["density"]), figure(row["ms_p50"]),
            ratio(row["vs_fa3_paged"]), ratio(row["vs_fa2"]), error(row["rel_error"]),
        )
        for row in mine
    ]  # fmt: skip
    which = name_of(provider).removeprefix("S2O")
    return table(f"S2O's speed on {gpu}{which}", columns, cells) if cells else None


def _attention_rows(rows: Sequence[Row]) -> Markup:
    columns = ("provider", "shape", "tokens", "density", "ms", "against FA3 on pages", "relative error", "note")
    cells = [
        (
            name_of(row["provider"]), row["shape"], f"{row['seq_len']:,}", percent(row["density"]),
            figure(row["ms_p50"]), ratio(row["vs_fa3_paged"]), error(row["rel_error"]), row["note"],
        )
        for row in rows
    ]  # fmt: skip
    return table("attention.csv", columns, cells)


def _providers(rows: Sequence[Row]) -> list[str]:
    """S2O first, then in the order of the table."""
    return sorted(dict.fromkeys(row["provider"] for row in rows), key=lambda provider: not ours(provider))


def _once(rows: Sequence[Row], provider: str) -> list[Row]:
    """A provider's rows by length; where several runs measured one point, the first."""
    points: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["provider"] == provider:
            points.setdefault((row["seq_len"], -round(row["density"] or 0.0, 2), row["note"]), row)
    return [points[at] for at in sorted(points)]


# -- serving ----------------------------------------------------------------------------------------------------------


def serving(rows: Sequence[Row]) -> Markup:
    """Time to the first token: a chart for each tool and concurrency, whose figures cannot be compared."""
    timed = [row for row in rows if row["ttft_ms_p50"]]
    x = axes.lengths("prompt length, tokens", [row["prompt_len"] for row in timed]) if timed else None
    y = axes.decades("time to the first token", [row["ttft_ms_p50"] for row in timed], "ms") if timed else None
    figures = []
    for key in dict.fromkeys(map(_alike, timed)):
        model, _, vllm, tool, concurrency = key
        at_once = "one prompt at a time" if concurrency == 1 else f"{concurrency} prompts at once"
        if x and y:
            mine = [row for row in timed if _alike(row) == key]
            figures.append(_ttft(mine, x, y, f"{model}, {tool}, vLLM {vllm}, {at_once}"))
    columns = (
        "backend", "tool", "tokens in", "tokens out", "at once", "first token, ms", "per token, ms", "tokens/s",
        "density",
    )  # fmt: skip
    cells = [
        (
            name_of(row["backend"]), row["tool"], f"{row['prompt_len']:,}", row["output_len"],
            row["concurrency"] or "all", figure(row["ttft_ms_p50"]), figure(row["tpot_ms_p50"]),
            figure(row["tokens_per_s"]), percent(row["density"]),
        )
        for row in rows
    ]  # fmt: skip
    return joined(
        (
            el("h3", "Time to the first token against length"),
            el("p", conditions(rows, ("model", "gpu", "vllm", "date", "commit")), class_="soft"),
            el("div", *figures, class_="charts"),
            table("serving.csv", columns, cells),
        )
    )


def _alike(row: Row) -> tuple[Any, ...]:
    """What figures of one chart have in common."""
    return tuple(row[name] for name in ("model", "gpu", "vllm", "tool", "concurrency"))


def _ttft(rows: Sequence[Row], x: axes.Axis, y: axes.Axis, note: str) -> Markup:
    series = []
    for number, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
        mine = sorted((row for row in rows if row["backend"] == backend), key=lambda row: row["prompt_len"])
        points = [
            Point(
                row["prompt_len"], row["ttft_ms_p50"], axes.duration(row["ttft_ms_p50"]),
                f"{name_of(backend)}, {row['prompt_len']:,} tokens in, {row['output_len']} out: "
                f"{row['ttft_ms_p50']:,.4g} ms to the first token",
            )
            for row in mine
        ]  # fmt: skip
        look = look_of(backend) if backend.startswith("s2o") or backend in LOOK_OF else 2 + number
        series.append(Series(name_of(backend), points, look))
    says = "Milliseconds to the first token by prompt length, a line for each backend."
    return chart("Time to the first token", says, x, y, series, f"{note}.")
