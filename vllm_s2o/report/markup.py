"""Elements of HTML and SVG. What is not an element is text, and is escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

VOID = {"br", "col", "hr", "img", "meta"}
"""Elements of HTML that have no end. Those of SVG end like all others."""


class Markup(str):
    """Text that is HTML already: `el` and `joined` make it, and nothing else should."""


def el(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element.

    Args:
        children: elements, or text; None is left out.
        attributes: `class_` and `for_` without the underscore at the end, others with hyphens; None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{given}>{joined(children)}{end}")


def joined(children: Iterable[Any]) -> Markup:
    """Elements and text one after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(_text(child)) for child in children if child is not None
        )
    )


def _text(value: Any) -> str:
    """Numbers as short as places on a drawing need them."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table that scrolls sideways where the page is narrow; the first column names its rows."""
    head = el("tr", *(el("th", column, scope="col") for column in columns))
    body = [el("tr", el("th", row[0], scope="row"), *map(_cell, row[1:])) for row in rows]
    whole = el("table", el("caption", caption), el("thead", head), el("tbody", *body))
    # A part that scrolls must be reachable by keyboard, and then have a name.
    return el("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _cell(value: Any) -> Markup:
    """Numbers stand below each other by their ends, words by their beginnings."""
    text = _text(value)
    return el("td", text, class_=None if text[:1] in "+-0123456789" else "words")


def folded(title: str, *children: Any) -> Markup:
    """What opens on a click."""
    return el("details", el("summary", title), *children)


def listed(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names and what they are."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in pairs))
