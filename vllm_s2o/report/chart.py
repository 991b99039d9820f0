"""Lines and points over two axes, as SVG. Colours are classes of the page's style, so that they follow its scheme."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .axes import Axis
from .markup import Markup, el, joined

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 12, 50
"""Margins: for the names of ticks and the axes' titles."""

TEXT = 14
"""Size of all text: a phone shows the drawing at two thirds of its size."""

DIGIT = 7.8
"""Width of a character, at most."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str = ""
    """Beside the point, where there is room."""
    says: str = ""
    """What a pointer that rests on it is told."""


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    look: int = 0
    """Which of the style's colours, and which mark, if `mark` names no other."""
    mark: int | None = None
    line: bool = True
    dashed: bool = False
    """A line that is no measurement, or one of another kind."""
    marks: bool = True


def marker(one: Series, x: float, y: float, says: str = "") -> Markup:
    """A mark whose shape tells its series apart, for those who cannot tell its colour."""
    title = el("title", says) if says else None
    r, kind = 4.5, (one.look if one.mark is None else one.mark) % 6
    attributes = {"class_": f"m c{one.look}"}
    if kind == 0:
        return el("circle", title, cx=x, cy=y, r=r, **attributes)
    if kind == 1:
        return el("rect", title, x=x - r + 0.5, y=y - r + 0.5, width=2 * r - 1, height=2 * r - 1, **attributes)
    corners = {
        2: ((0, -r - 1), (r + 0.5, r - 1), (-r - 0.5, r - 1)),
        3: ((0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)),
        4: ((0, r + 1), (r + 0.5, -r + 1), (-r - 0.5, -r + 1)),
    }
    if kind in corners:
        return el("polygon", title, points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners[kind]), **attributes)
    d = f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}M{x - r:.1f} {y + r:.1f}l{2 * r} {-2 * r}"
    return el("path", title, d=d, **attributes | {"class_": f"m x c{one.look}"})


def legend(series: Sequence[Series]) -> Markup:
    """Names of the series, as text of the page: it stays readable however small the drawing is."""
    keys = []
    for one in series:
        line = _path([(1.0, 8.0), (25.0, 8.0)], one) if one.line else None
        mark = marker(one, 13.0, 8.0) if one.marks else None
        keys.append(el("li", el("svg", line, mark, viewBox="0 0 26 16", aria_hidden="true"), " ", one.name))
    return el("ul", *keys, class_="legend")


def chart(title: str, says: str, x: Axis, y: Axis, series: Sequence[Series], note: str = "") -> Markup:
    """A figure with its title, its series' names and, where given, a note below.

    Args:
        says: what the drawing shows, for those who do not see it.
    """
    places = [
        (one, point, LEFT + x.share(point.x) * (WIDTH - LEFT - RIGHT), TOP + (1 - y.share(point.y)) * _inner())
        for one in series
        for point in one.points
    ]
    lines = [_path([(left, top) for other, _, left, top in places if other is one], one) for one in series if one.line]
    marks = [
        marker(one, left, top, point.says or f"{one.name}: {point.label}")
        for one, point, left, top in places
        if one.marks
    ]
    drawing = el(
        "svg", el("title", title), el("desc", says), *_frame(x, y), *lines, *marks, _labels(places),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {says}",
    )  # fmt: skip
    caption = el("figcaption", el("b", title), el("span", note) if note else None)
    return el("figure", caption, drawing, legend(series))


def _inner() -> int:
    return HEIGHT - TOP - BOTTOM


def _path(places: Sequence[tuple[float, float]], one: Series) -> Markup:
    d = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
    return el("path", d=d, class_=f"l c{one.look}{' dashed' if one.dashed else ''}")


def _frame(x: Axis, y: Axis) -> Iterator[Markup]:
    """Grid, names of ticks, titles of the axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value, name in x.ticks:
        left = LEFT + x.share(value) * (right - LEFT)
        yield el("path", d=f"M{left:.1f} {TOP}V{bottom}", class_="grid")
        yield el("text", name, x=left, y=bottom + TEXT + 4, text_anchor="middle", class_="tick")
    for value, name in y.ticks:
        top = TOP + (1 - y.share(value)) * _inner()
        yield el("path", d=f"M{LEFT} {top:.1f}H{right}", class_="grid")
        yield el("text", name, x=LEFT - 6, y=top + TEXT / 3, text_anchor="end", class_="tick")
    yield el("path", d=f"M{LEFT} {TOP}V{bottom}H{right}", class_="axis")
    yield el("text", x.title, x=(LEFT + right) / 2, y=HEIGHT - 8, text_anchor="middle", class_="title")
    middle = TOP + _inner() / 2
    place = {"x": 14, "y": middle, "transform": f"rotate(-90 14 {middle:.0f})"}
    yield el("text", y.title, text_anchor="middle", class_="title", **place)


def _labels(places: Sequence[tuple[Series, Point, float, float]]) -> Markup:
    """Each point's label on the first side where it covers neither a mark nor another label; else none."""
    taken = [(left - 6, top - 6, left + 6, top + 6) for one, _, left, top in places if one.marks]
    drawn = []
    for one, point, left, top in places:
        width = DIGIT * len(point.label)
        sides = (
            ("start", left + 9, top + 5), ("end", left - 9, top + 5),
            ("middle", left, top - 9), ("middle", left, top + 19),
        )  # fmt: skip
        for anchor, x, y in sides if point.label else ():
            start = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (start - 2, y - TEXT + 2, start + width + 2, y + 2)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > TOP - 10 and box[3] < HEIGHT - BOTTOM
            if inside and not any(map(_overlap, itertools.repeat(box), taken)):
                taken.append(box)
                drawn.append(el("text", point.label, x=x, y=y, text_anchor=anchor, class_=f"label c{one.look}"))
                break
    return joined(drawn)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
