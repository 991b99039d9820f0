"""The results' part of the page: a section for each table that is there."""

from .markup import Markup, el, joined
from .results import MADE_BY, Results
from .scores import frontier, tasks
from .speed import attention, serving

DRAWN = {"attention.csv": attention, "frontier.csv": frontier, "serving.csv": serving, "tasks.csv": tasks}


def section(results: Results) -> Markup:
    """All charts and tables of a directory, and which tables it lacks."""
    parts = [DRAWN[name](rows) if rows else _empty(name) for name, rows in results.tables.items()]
    lacks = [f"{name} ({MADE_BY[name]} makes it)" for name in results.missing]
    return joined(
        (
            el("h2", "Results"),
            el("p", "From ", el("code", str(results.directory)), f": {', '.join(results.tables)}."),
            el("p", f"Not there, and so not shown: {', '.join(lacks)}.", class_="soft") if lacks else None,
            *parts,
        )
    )


def _empty(name: str) -> Markup:
    return joined((el("h3", name), el("p", "The table has no rows.")))
