"""The maps of a head as drawings: pixels in shades of light and dark, names around them, the stop line over them."""

import torch

from . import axes, png
from .maps import LEAST, Maps, shades
from .markup import Markup, el, joined
from .style import DARK, LIGHT

SIDE, LEFT, TOP, BOTTOM = 404, 62, 10, 52
"""A map, and the room for names around it."""


def before(maps: Maps, whose: str) -> Markup:
    """Keys by position; whose: which layer and head."""
    note = "Keys in the order of their positions."
    return _map(maps, maps.before, whose, "Before permutation", note, ("key's position", "query's position"), None)


def after(maps: Maps, whose: str) -> Markup:
    """Keys in the order of their visits, with the stop line."""
    return _map(
        maps, maps.after, whose, "After permutation, with the stop line",
        "Own segment to the dashed line, then the history by importance.",
        ("keys in the order of their visits", "query's position"), _lines(maps),
    )  # fmt: skip


def _map(
    maps: Maps, shares: torch.Tensor, whose: str, title: str, note: str, names: tuple[str, str], lines: Markup | None
) -> Markup:
    rows = shades(shares)
    says = f"{title}: {whose}. {note}"
    place = {"x": LEFT, "y": TOP, "width": SIDE, "height": SIDE, "preserveAspectRatio": "none"}
    pictures = [
        el("image", href=png.uri(png.png(rows, colours)), class_=f"in-{scheme}", **place)
        for scheme, colours in (("light", LIGHT), ("dark", DARK))
    ]
    drawing = el(
        "svg", el("title", title), el("desc", says), *pictures, _frame(maps, *names), lines,
        viewBox=f"0 0 480 {TOP + SIDE + BOTTOM}", role="img", aria_label=says,
    )  # fmt: skip
    legend = el("ul", el("li", el("i"), " where each tile stops"), class_="legend") if lines else None
    return el("figure", el("figcaption", el("b", title), el("span", note)), drawing, legend)


def _frame(maps: Maps, x_title: str, y_title: str) -> Markup:
    bottom = TOP + SIDE
    drawn = [el("rect", x=LEFT, y=TOP, width=SIDE, height=SIDE, class_="axis")]
    step = 1
    while step * 4 < maps.extent:
        step *= 2
    step = max(step // 2, 1) if step * 3 > maps.extent else step
    for value in range(0, maps.extent + 1, step):
        x = LEFT + SIDE * value / maps.extent
        drawn.append(el("path", d=f"M{x:.1f} {bottom}v5", class_="axis"))
        drawn.append(el("text", axes.tokens(value), x=x, y=bottom + 19, text_anchor="middle", class_="tick"))
    for value in range(0, maps.num_tokens + 1, step):
        y = TOP + SIDE * value / maps.num_tokens
        drawn.append(el("path", d=f"M{LEFT} {y:.1f}h-5", class_="axis"))
        drawn.append(el("text", axes.tokens(value), x=LEFT - 8, y=y + 5, text_anchor="end", class_="tick"))
    middle = TOP + SIDE / 2
    drawn.append(el("text", x_title, x=LEFT + SIDE / 2, y=bottom + 44, text_anchor="middle", class_="title"))
    turned = {"x": 14, "y": middle, "transform": f"rotate(-90 14 {middle:.0f})"}
    drawn.append(el("text", y_title, text_anchor="middle", class_="title", **turned))
    return joined(drawn)


def stop_steps(maps: Maps) -> list[tuple[float, float, float]]:
    """The stop line as steps: column in keys, first line, line after the last."""
    steps, line = [], 0
    for stop in maps.stops:
        steps.append((float(maps.segment_len + stop.visited), float(line), float(line + stop.lines)))
        line += stop.lines
    return [step for step in steps if step[1] < step[2]]


def _lines(maps: Maps) -> Markup:
    """The stop line, and the border of the own segment."""
    count = len(maps.after)

    def x(keys: float) -> str:
        return f"{LEFT + SIDE * keys / maps.extent:.2f}"

    d = ""
    for keys, first, end in stop_steps(maps):
        d += f"{'L' if d else 'M'}{x(keys)} {TOP + SIDE * first / count:.2f}V{TOP + SIDE * end / count:.2f}"
    own = el("path", d=f"M{x(maps.segment_len)} {TOP}v{SIDE}", class_="own")
    return joined((own, el("path", d=d, class_="halo"), el("path", d=d, class_="stop")))


def scale() -> Markup:
    """Which shade means how much."""
    names = f"{100 * LEAST:g} %", "100 % of a query's attention"
    row = [bytes(range(1, len(LIGHT) + 1))]
    pictures = [
        el("img", src=png.uri(png.png(row, colours)), alt="shades from little to much attention", class_=f"in-{scheme}")
        for scheme, colours in (("light", LIGHT), ("dark", DARK))
    ]
    return el("p", el("span", names[0]), *pictures, el("span", names[1]), class_="scale")
