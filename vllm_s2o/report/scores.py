"""What was lost: error against density on a model's own attention, and scores on tasks."""

from collections.abc import Sequence

from . import axes
from .chart import Point, Series, chart
from .markup import Markup, el, folded, joined, table
from .results import Row
from .style import LOOKS
from .words import LOOK_OF, error, name_of, percent

# -- frontier ---------------------------------------------------------------------------------------------------------


def frontier(rows: Sequence[Row]) -> Markup:
    """Error against density on a model's own attention; charts hold the mean over layers."""
    figures = []
    for key in dict.fromkeys((row["model"], row["seq_len"], row["split"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["seq_len"], row["split"]) == key and row["layer"] == "all"]
        shown = [row for row in mine if row["rel_error"] > 0 and row["density"] > 0]
        if shown:
            figures.append(_frontier(shown, f"{key[0]}, {key[1]:,} tokens, {key[2]} text, mean over layers"))
    mean = [row for row in rows if row["layer"] == "all"]
    columns = ("method", "model", "tokens", "text", "density", "relative error")
    cells = [
        (
            row["method"], row["model"], f"{row['seq_len']:,}", row["split"], percent(row["density"]),
            error(row["rel_error"]),
        )
        for row in mean
    ]  # fmt: skip
    single = len(rows) - len(mean)
    return joined(
        (
            el("h3", "Error against density on a model's own attention"),
            el("div", *figures, class_="charts") if figures else el("p", "No row is the mean over layers."),
            folded(
                f"All {len(mean)} rows of frontier.csv that are means over layers",
                table("frontier.csv", columns, cells),
            ),
            el("p", f"The table has {single} rows more, of single layers.", class_="soft") if single else None,
        )
    )


def _frontier(rows: Sequence[Row], note: str) -> Markup:
    series = []
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["density"])
        points = [
            Point(
                row["density"], row["rel_error"],
                says=f"{method}: relative error {row['rel_error']:.2g} at a density of {percent(row['density'])}",
            )
            for row in mine
        ]  # fmt: skip
        look = number % LOOKS  # of many methods some share a colour, but then not a mark
        series.append(Series(method, points, look, number, dashed=not method.startswith("s2o")))
    return chart(
        "Error against density", "Relative error by density, a line for each method.",
        axes.shares("density: visited / causal pairs", [row["density"] for row in rows]),
        axes.decades("relative error", [row["rel_error"] for row in rows]), series,
        f"{note}; full lines: S2O. Lower left is better.",
    )  # fmt: skip


# -- tasks ------------------------------------------------------------------------------------------------------------


def tasks(rows: Sequence[Row]) -> Markup:
    """Scores: the average over tasks by length, and all of them in the table."""
    mean = [row for row in rows if row["task"] == "average" and row["length"].isdigit() and int(row["length"]) > 0]
    figure = None
    if mean:
        series = []
        for number, backend in enumerate(dict.fromkeys(row["backend"] for row in mean)):
            points = [
                Point(
                    int(row["length"]), row["score"], f"{row['score']:.0f}",
                    f"{name_of(backend)}, {int(row['length']):,} tokens: {row['score']:.1f} ± {row['ci95']:.1f}",
                )
                for row in mean
                if row["backend"] == backend
            ]  # fmt: skip
            series.append(Series(name_of(backend), points, LOOK_OF.get(backend, 2 + number)))
        lengths = axes.lengths("prompt length, tokens", [int(row["length"]) for row in mean])
        figure = chart(
            "Average score against length", "Points by prompt length, mean over tasks, a line for each backend.",
            lengths, axes.points("points"), series, f"{mean[0]['model']}. Higher is better.",
        )  # fmt: skip
    columns = ("task", "backend", "length", "score", "density", "samples", "against dense")
    cells = [
        (
            row["task"], name_of(row["backend"]), row["length"], f"{row['score']:.1f} ± {row['ci95']:.1f}",
            percent(row["density"]), row["samples"], _difference(row),
        )
        for row in rows
    ]  # fmt: skip
    return joined(
        (
            el("h3", "Scores on tasks"),
            el("div", figure, class_="charts") if figure else None,
            folded(
                f"All {len(rows)} rows of tasks.csv", table("tasks.csv: points with 95 % intervals", columns, cells)
            ),
        )
    )


def _difference(row: Row) -> str:
    if row["difference"] is None or row["difference_low"] is None or row["difference_high"] is None:
        return ""
    return f"{row['difference']:+.1f} ({row['difference_low']:+.1f} to {row['difference_high']:+.1f})"
