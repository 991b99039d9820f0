"""The prompt's part of the page: two maps of one head, density by layer and head, error against density."""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_s2o.config import ResolvedConfig

from . import axes
from .capture import LayerFigures
from .chart import Point, Series, chart
from .maps import Maps, Stop
from .markup import Markup, el, folded, joined, listed, table
from .pictures import LEFT, SIDE, TOP, after, before, scale
from .words import error, percent


class Prompt(NamedTuple):
    """What was run, and what was found."""

    model: str
    text: str
    """Name of a text, or of a file: never what it says."""
    num_tokens: int
    rope_factor: float
    config: ResolvedConfig
    layers: Sequence[LayerFigures]
    layer: int
    head: int
    maps: Maps

    @property
    def density(self) -> float:
        """Mean over all layers, dense ones included."""
        return sum(layer.density for layer in self.layers) / len(self.layers)


def section(prompt: Prompt) -> Markup:
    """Facts, maps, densities and errors."""
    whose = f"layer {prompt.layer}, head {prompt.head}"
    return joined(
        (
            el("h2", "One prompt"),
            _facts(prompt),
            el("h3", f"Attention of {whose}"),
            _explained(prompt),
            el("div", before(prompt.maps, whose), after(prompt.maps, whose), class_="charts"),
            scale(),
            folded("How far each tile goes", _stops(prompt.maps.stops)),
            el("h3", "Density by layer and head"),
            el("div", grid(prompt), _errors(prompt.layers), class_="charts"),
            folded("Density and error of all layers and heads", _figures(prompt.layers)),
        )
    )


def _facts(prompt: Prompt) -> Markup:
    config = prompt.config
    sparse = sum(layer.sparse for layer in prompt.layers)
    errors = [layer.rel_error for layer in prompt.layers if layer.sparse]
    longer = "" if prompt.rope_factor == 1 else f", context extended by YaRN x{prompt.rope_factor:g}"
    return listed(
        (
            ("model", prompt.model),
            ("prompt", f"{prompt.num_tokens:,} tokens of {prompt.text}{longer}"),
            ("density", f"{percent(prompt.density)} of all causal pairs, mean over {len(prompt.layers)} layers"),
            ("error", f"{error(sum(errors) / len(errors))}, mean over {sparse} sparse layers"),
            ("config", joined(el("div", line.removeprefix("config ")) for line in config.describe())),
        )
    )


def _explained(prompt: Prompt) -> Markup:
    every = -(-prompt.num_tokens // len(prompt.maps.before))
    queries = "All queries are drawn" if every == 1 else f"One query of {every} is drawn, as a line"
    keys = "one key" if prompt.maps.keys == 1 else f"{prompt.maps.keys} neighbouring keys together"
    return el(
        "p", f"{queries}; a pixel shows the share of its attention that {keys} get. The visited keys, left of the "
        f"stop line, hold {100 * prompt.maps.kept:.2f} % of the drawn queries' attention.",
    )  # fmt: skip


def _stops(stops: Sequence[Stop]) -> Markup:
    columns = ("segment from", "tile", "history, keys", "visited", "share")
    rows, tile = [], 0
    for number, stop in enumerate(stops):
        tile = tile + 1 if number and stops[number - 1].start == stop.start else 0
        share = percent(stop.visited / stop.start) if stop.start else "no history"
        rows.append((f"{stop.start:,}", tile, f"{stop.start:,}", f"{stop.visited:,}", share))
    return table("Keys of its history that each tile of the drawn head visits", columns, rows)


# -- densities and errors ---------------------------------------------------------------------------------------------


def grid(prompt: Prompt) -> Markup:
    """A cell for each layer and head, the denser the fuller; the drawn one has a frame."""
    heads, layers = len(prompt.layers[0].densities), len(prompt.layers)
    width, height = SIDE / heads, max(min(18.0, 540 / layers), 6.0)
    bottom = TOP + height * layers
    cells, texts = [], []
    for row, layer in enumerate(prompt.layers):
        for head, density in enumerate(layer.densities):
            x, y = LEFT + width * head, TOP + height * row
            says = f"layer {layer.layer}, head {head}: {percent(density)}{'' if layer.sparse else ', kept dense'}"
            place = {"x": x, "y": y, "width": width, "height": height}
            cells.append(el("rect", el("title", says), class_="cell", fill_opacity=f"{density:.3f}", **place))
            if width >= 38 and height >= 16:
                shade = "low" if density < 0.5 else "mid" if density < 0.66 else "high"
                number = percent(density).removesuffix(" %")
                texts.append(
                    el("text", number, x=x + width / 2, y=y + height / 2 + 5, text_anchor="middle", class_=shade)
                )
    chosen = {"x": LEFT + width * prompt.head, "y": TOP + height * prompt.layer, "width": width, "height": height}
    every = {"layer": max(1, round(18 / height)), "head": max(1, round(24 / width))}
    names = [
        el("text", layer, x=LEFT - 8, y=TOP + height * (layer + 0.5) + 5, text_anchor="end")
        for layer in range(0, layers, every["layer"])
    ]
    names += [
        el("text", head, x=LEFT + width * (head + 0.5), y=bottom + 18, text_anchor="middle")
        for head in range(0, heads, every["head"])
    ]
    side = TOP + height * layers / 2
    titles = (
        el("text", "query head", x=LEFT + SIDE / 2, y=bottom + 42, text_anchor="middle", class_="title"),
        el("text", "layer", x=14, y=side, transform=f"rotate(-90 14 {side:.0f})", text_anchor="middle", class_="title"),
    )
    says = "Visited / causal pairs of each head, in percent. The table below has all numbers."
    drawing = el(
        "svg", el("title", "Density by layer and head"), el("desc", says), *cells, *texts,
        el("rect", class_="chosen", **chosen), *names, *titles,
        viewBox=f"0 0 480 {bottom + 50:.0f}", role="img", aria_label=says,
    )  # fmt: skip
    note = "Visited / causal pairs in percent, the fuller the denser; the frame is the head drawn above."
    return el("figure", el("figcaption", el("b", "Density"), el("span", note)), drawing)


def _errors(layers: Sequence[LayerFigures]) -> Markup | None:
    """A point for each layer that is sparse."""
    shown = [layer for layer in layers if layer.sparse and layer.rel_error > 0]
    if not shown:
        return None
    points = [
        Point(
            layer.density, layer.rel_error, str(layer.layer),
            f"layer {layer.layer}: relative error {layer.rel_error:.2g} at a density of {percent(layer.density)}",
        )
        for layer in shown
    ]  # fmt: skip
    return chart(
        "Error against density", "Relative error by density, a point for each sparse layer.",
        axes.shares("density: visited / causal pairs", [layer.density for layer in shown]),
        axes.decades("relative error", [layer.rel_error for layer in shown]),
        [Series("a layer, with its number", points, line=False)],
        "Mean squared difference from dense attention on what enters the layer, relative to its mean square.",
    )  # fmt: skip


def _figures(layers: Sequence[LayerFigures]) -> Markup:
    heads = len(layers[0].densities)
    columns = ("layer", "density", "error", *(f"head {head}" for head in range(heads)))
    rows = [
        (
            layer.layer, f"{layer.density:.4f}", error(layer.rel_error) if layer.sparse else "dense",
            *(f"{density:.4f}" for density in layer.densities),
        )
        for layer in layers
    ]  # fmt: skip
    return table("Density by layer and head, error by layer", columns, rows)
