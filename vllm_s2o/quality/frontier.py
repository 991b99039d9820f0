"""Error against density on a model's own attention: S2O, its variants, other methods and two bounds.

    python -P -m vllm_s2o.quality.frontier MODEL --out frontier.csv [--tokens 8192] [--layers 1 9 17 25]
        [--texts code prose dialogue tables] [--split held-out] [--methods s2o_256 pbs ...] [--plot frontier.png]

Dense attention feeds every layer, and each layer is judged by itself. One value of a method's parameter holds for all
heads and layers; a row is the mean over heads and texts at the same value, and layer `all` the mean over layers too,
interpolated to the densities and relative errors of `curves.py`. Densities that a method does not reach have no row.

Machine, versions, commit and settings stand in FILE.made.json. What is swept is kept in FILE.parts.jsonl, for each
text and layer and each head: a run that was cut off goes on from there, and one that wants more texts or layers adds
them.
"""

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vllm_s2o.cli.environment import commit_name, describe, write_made

from . import picture
from .calibration.curves import sample
from .capture import CaptureError, Layer, Source, checked_layers, open_model, visit_layers
from .curves import Curve, at_density, at_error, matched, mean_curve
from .journal import JournalError
from .parts import Parts, as_lists
from .selection import S2O, Rule, method
from .sweep import FIGURES, sweep
from .text import REAL, SOURCES, SPLITS

METHODS = (
    "s2o_256_first1", "s2o_256_first1_tail64_ref8192", "s2o_512", "s2o_512_tail128_ref8192",
    "s2o_256_kvhead_first1", "s2o_512_kvhead", "s2o_256_mean", "s2o_256_mean_every4",
    "pbs", "block_mean", "flashprefill", "xattention", "flexprefill", "top_k", "top_p",
)  # fmt: skip
"""The second and the fourth are what ships, for SmolLM2 and for models without a file of their own."""

COLUMNS = ("model", "seq_len", "split", "layer", "method", *FIGURES)

ALL = "all"

TILE = 128
"""Queries that a method selects for together."""


class FrontierError(RuntimeError):
    """Why there is no table, in one sentence."""


def looked_at(num_tokens: int, every: int, text: str, layer: int, turn: int) -> list[int] | None:
    """Tiles of a layer that all rules are judged on; None for all.

    By chance, but for the last run of neighbours, whose tiles take turns: a prompt's end, which some rules visit
    densely, is one tile of many, and must have its share of all layers and texts together.
    """
    if every == 1:
        return None
    chosen = sample(num_tokens, TILE, 0, text, layer, every)
    tiles = -(-num_tokens // TILE)
    last = tiles - tiles * (len(chosen) - 1) // len(chosen)
    return [*chosen[:-1], tiles - 1 - turn % last]


def key_of(text: str, ids: Sequence[int]) -> str:
    """What a text is kept under. A file of one's own may have changed since."""
    return text if text in SOURCES else f"{text} {hashlib.sha256(str(list(ids)).encode()).hexdigest()[:12]}"


def measure(
    source: Source, parts: Parts, prompts: dict[str, list[int]], layers: Sequence[int], rules: dict, every: int
) -> None:
    """Sweep each text's layers that are not done.

    Args:
        prompts: tokens by text.
        every: one tile of so many is looked at, the same by all rules.
    """
    from tqdm import tqdm

    keys = {text: key_of(text, ids) for text, ids in prompts.items()}
    left = {text: [layer for layer in layers if (keys[text], layer) not in parts.done] for text in prompts}
    if not any(left.values()):
        return
    model = source.load()
    heads = source.traits.num_heads
    pairs = sum(len(left[text]) * heads * len(ids) * (len(ids) + 1) // 2 for text, ids in prompts.items()) // every
    # Pairs, not tiles: the later a tile the longer it takes. What is left is told by the mean pace, not the last one.
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
    with tqdm(total=pairs, bar_format=shown, smoothing=0) as bar:
        for place, (text, ids) in enumerate(prompts.items()):
            bar.set_description(f"{text}: running the model")

            def visit(layer: Layer, text: str = text, place: int = place) -> None:
                bar.set_description(f"{text}, layer {layer.index}")
                query, key, value = (t.to(model.device) for t in (layer.query, layer.key, layer.value))
                turn = layers.index(layer.index) + len(layers) * place
                chosen = looked_at(len(layer.query), every, text, layer.index, turn)
                swept = sweep(query, key, value, layer.scale, rules, tile_size=TILE, chosen=chosen, progress=bar.update)
                parts.add(keys[text], layer.index, as_lists(swept))
                bar.set_description(f"{text}: running the model")

            if left[text]:
                visit_layers(model, ids, left[text], visit)


def curve(parts: Parts, name: str, texts: Sequence[str], layers: Sequence[int]) -> Curve:
    """A method's mean over texts, layers and heads."""
    return mean_curve(parts.done[text, layer][name] for text in texts for layer in layers)


def rows(
    parts: Parts, rules: dict[str, Rule], texts: Sequence[str], layers: Sequence[int], every: int, common: Sequence
) -> Iterator[tuple]:
    """Rows of the table; common: its first three columns."""
    # Where few tiles are looked at, single layers have a dense end too often or not at all.
    sampled = {name for name, rule in rules.items() if every > 1 and isinstance(rule, S2O) and rule.dense_tail}
    for label, some in [*((str(layer), [layer]) for layer in layers), (ALL, layers)]:
        for name in rules if label == ALL else [name for name in rules if name not in sampled]:
            for point in matched(curve(parts, name, texts, some)):
                yield (*common, label, name, *(f"{figure:.5g}" for figure in point))


def summary(curves: dict[str, Curve], against: str = "pbs") -> str:
    """Means over layers: error at matched densities, density at matched errors, and how much better that is."""
    lines = [
        f"{'':20}  MSE / relative error at 10 %, 15 %, 20 % (times below {against}'s)".ljust(100) + "density at 1e-2"
    ]
    for name, curve in curves.items():
        cells = []
        for density in (0.1, 0.15, 0.2):
            point, other = (at_density(c, density) for c in (curve, curves.get(against, ())))
            cell = "not reached" if point is None else f"{point.mse:.1e} / {point.rel_error:.1e}"
            if point and other and name != against:
                cell += f" ({other.mse / point.mse:.1f}x, {other.rel_error / point.rel_error:.1f}x)"
            cells.append(cell.ljust(36))
        point, other = (at_error(c, 1e-2) for c in (curve, curves.get(against, ())))
        cell = "" if point is None else f"{point.density:.3f}"
        if point and other and name != against:
            cell += f" ({other.density / point.density:.1f}x)"
        lines.append(f"{name:20}  {''.join(cells)}{cell}".rstrip())
    return "\n".join(lines)


def write(path: Path, table: Iterable[tuple]) -> None:
    """The table as a whole, or not at all."""
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(table)
    unfinished.replace(path)


def frontier(
    model: str,
    out: Path,
    *,
    num_tokens: int = 8192,
    layers: Sequence[int] | None = None,
    texts: Sequence[str] = REAL,
    split: str = "held-out",
    methods: Sequence[str] = METHODS,
    every: int = 1,
) -> dict[str, Curve]:
    """Sweep what is not swept yet, write the table, and return each method's mean curve over all layers and texts.

    Args:
        model: a directory, or a name that transformers knows.
        layers: all by default.
        texts: names as in `text.pieces`.
        methods: names as in `selection.method`.
        every: look at one tile of so many; the table then estimates what all of them would give.

    Raises:
        FrontierError, CaptureError: in one sentence, whatever went wrong.
    """
    try:
        rules = {name: method(name) for name in methods}
    except ValueError as error:
        raise FrontierError(str(error)) from error
    if not texts or not rules:
        raise FrontierError("At least one text and one method must be named.")
    source = open_model(model, num_tokens)
    layers = checked_layers(range(source.traits.num_layers) if layers is None else layers, source.traits)
    texts = list(dict.fromkeys(texts))
    prompts = {text: source.prompt(text, num_tokens, split) for text in texts}
    settings = {
        "model": model, "tokens": num_tokens, "split": split, "context extension": source.rope_factor, "every": every,
        "methods": {name: {**vars(rule), "values": rule.values} for name, rule in rules.items()},
        "commit": commit_name(describe()),
        "Python": ".".join(map(str, sys.version_info[:3])),  # whose texts they are
    }  # fmt: skip
    try:
        parts = Parts(out.with_name(out.name + ".parts.jsonl"), settings)
    except JournalError as error:
        raise FrontierError(str(error)) from error
    measure(source, parts, prompts, layers, rules, every)
    keys = [key_of(text, ids) for text, ids in prompts.items()]
    common = (Path(model).resolve().name, num_tokens, split)
    try:
        write(out, rows(parts, rules, keys, layers, every, common))
        write_made(out, {"texts": keys, "layers": list(layers), **settings})
    except OSError as error:
        raise FrontierError(f"Cannot write {out}: {error.strerror}.") from error
    return {name: curve(parts, name, keys, layers) for name in rules}


def draw(curves: dict[str, Curve], title: str, out: Path) -> None:
    """Relative error over density, both logarithmic; S2O in full lines, others dashed, bounds dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for index, (name, curve) in enumerate(curves.items()):
        style = "-" if name.startswith("s2o") else ":" if name.startswith("top") else "--"
        points = [point for point in curve if point.rel_error > 1e-8]
        axes.plot(
            [p.density for p in points], [p.rel_error for p in points], style, marker=".", label=name,
            color=colours[index % len(colours)],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="density: visited / causal pairs", ylabel="relative error (MSE)")
    axes.set_ylim(1e-5, 1)
    axes.set_xlim(0.02, 1)
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1], ["2 %", "5 %", "10 %", "20 %", "30 %", "50 %", "100 %"])
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -P -m vllm_s2o.quality.frontier",
        description="Error against density on a model's own attention, for S2O and other methods of sparse prefill.",
    )
    parser.add_argument("model", help="directory or name of the model")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, CSV; sweeps lie beside it")
    parser.add_argument("--tokens", type=int, default=8192, help="length of each prompt (default 8192)")
    parser.add_argument("--layers", nargs="+", default=[ALL], help="indices of layers, or all (default)")
    parser.add_argument(
        "--texts", nargs="+", default=REAL, help=f"{', '.join(SOURCES)}, or UTF-8 files (default: {' '.join(REAL)})"
    )
    parser.add_argument("--split", choices=SPLITS, default="held-out", help="part of each text (default held-out)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="look at one tile of N (default all)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the means over all layers")
    args = parser.parse_args()
    if args.layers != [ALL] and not all(layer.isdigit() for layer in args.layers):
        parser.error(f"--layers takes indices, or {ALL} alone, not {' '.join(args.layers)}")
    layers = None if args.layers == [ALL] else [int(layer) for layer in args.layers]
    if args.every < 1:
        parser.error(f"--every takes a number from 1, not {args.every}")
    if args.plot and (problem := picture.problem(args.plot)):
        parser.error(problem)
    try:
        curves = frontier(
            args.model, args.out, num_tokens=args.tokens, layers=layers,
            texts=args.texts, split=args.split, methods=args.methods, every=args.every,
        )  # fmt: skip
        if args.plot:
            title = f"{Path(args.model).resolve().name}, {args.tokens} tokens, {args.split} text, mean over layers"
            draw(curves, title, args.plot)
    except (FrontierError, CaptureError) as error:
        sys.exit(f"frontier: {error}")
    except OSError as error:
        sys.exit(f"frontier: cannot write {error.filename or args.plot}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("frontier: stopped; the same command goes on from here")
    print(summary(curves))


if __name__ == "__main__":
    main()
