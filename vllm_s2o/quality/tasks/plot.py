"""The table as a picture: for each length, each task's score by backend."""

from collections.abc import Sequence
from pathlib import Path

from .table import ALL, Row


def draw(found: Sequence[Row], title: str, out: Path) -> None:
    """Scores with their intervals, a panel for each length; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = list(dict.fromkeys(row.length for row in found if row.length != ALL))
    backends = list(dict.fromkeys(row.backend for row in found))
    figure, panels = plt.subplots(
        len(lengths), figsize=(10, 1 + 2.2 * len(lengths)), layout="constrained", sharey=True, squeeze=False
    )
    for axes, length in zip(panels[:, 0], lengths, strict=True):
        mine = [row for row in found if row.length == length]
        tasks = list(dict.fromkeys(row.task for row in mine))
        for index, backend in enumerate(backends):
            shown = [row for row in mine if row.backend == backend]
            places = [tasks.index(row.task) + 0.2 * (index - (len(backends) - 1) / 2) for row in shown]
            means = [row.score.mean for row in shown]
            ends = [
                [row.score.mean - row.score.low for row in shown],
                [row.score.high - row.score.mean for row in shown],
            ]
            axes.errorbar(places, means, yerr=ends, fmt="o", markersize=5, capsize=2, linewidth=1, label=backend)
        axes.set_xticks(range(len(tasks)), [task.replace("_", "\n", 1) for task in tasks], fontsize=8)
        axes.set(ylim=(-5, 105), ylabel="points")
        axes.set_title(f"{length:,} tokens", fontsize=9, loc="left")
        axes.grid(axis="y", alpha=0.25)
    panels[0, 0].legend(frameon=False, ncols=len(backends), loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title}: scores with 95 % intervals", fontsize=10)
    figure.savefig(out, dpi=110)
    plt.close(figure)
