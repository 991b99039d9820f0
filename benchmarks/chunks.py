#!/usr/bin/env python3
"""What cutting a prompt into chunks, or a cached prefix, does to S2O's error and density on a model's own attention.

    python benchmarks/chunks.py MODEL --out TABLE.csv [--tokens 8192] [--cuts 2048 2000 1000 500 200 130 4080+]

A chunk that ends inside a segment leaves its queries there a ranking of their own, made from fewer of them. `1000` cuts
after each 1,000 tokens; `4080+` once, after 4,080, as a cached prefix does. Each layer runs with the thresholds that
the model's config gives it, in every chunk: that a server leaves short ones dense (`min_seq_len`, `min_query_len`) is
not looked at. Errors are against dense attention on the same inputs. Needs no GPU.
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_s2o import S2OParams
from vllm_s2o.cli.environment import commit_name, describe
from vllm_s2o.config import ConfigError, load_config
from vllm_s2o.quality.capture import CaptureError, Layer, capture, dense_attention
from vllm_s2o.quality.cost import sparse_attention

COLUMNS = (
    "gpu", "torch", "date", "commit", "model", "tokens", "text", "layers", "cut", "density", "rel_error",
    "density_vs_whole", "error_vs_whole", "worst_error_vs_whole",
)  # fmt: skip
WHOLE = "whole"
CUTS = ("2048", "2000", "1000", "500", "200", "130", "4080+")


def ends(cut: str, tokens: int) -> list[int]:
    """Where the chunks of a prompt end."""
    if cut == WHOLE:
        return [tokens]
    if cut.endswith("+"):
        return [int(cut[:-1]), tokens]
    return [*range(int(cut), tokens, int(cut)), tokens]


class Found(NamedTuple):
    density: float
    rel_error: float


def measure(layer: Layer, params: S2OParams, cuts: list[str]) -> dict[str, Found]:
    exact = dense_attention(layer)
    power = exact.square().mean()
    found = {}
    for cut in cuts:
        out, density = sparse_attention(layer, params, ends(cut, len(layer.query)))
        found[cut] = Found(density, ((out - exact).square().mean() / power).item())
    return found


def ratio(value: float, whole: float) -> float:
    """1 where both are 0: where nothing is skipped."""
    if value == whole:
        return 1.0
    return value / whole if whole else math.inf


def rows(options: argparse.Namespace, text: str) -> list[dict]:
    captured = capture(options.model, options.tokens, options.layers, text, torch.device("cpu"))
    config = load_config(captured.traits)
    cuts = [WHOLE, *options.cuts]
    layers = []
    for layer in captured.layers:
        params = config.layer(layer.index)
        if params is None:
            continue
        layers.append(measure(layer, params, cuts))
        print(f"{text}, layer {layer.index}: " + ", ".join(f"{c} {f.rel_error:.2e}" for c, f in layers[-1].items()))
    if not layers:
        sys.exit(f"chunks.py: {config.source} makes none of the layers of {captured.traits.name} sparse.")
    found = []
    for cut in cuts:
        density, error = (statistics.mean(layer[cut][i] for layer in layers) for i in (0, 1))
        whole_density, whole_error = (statistics.mean(layer[WHOLE][i] for layer in layers) for i in (0, 1))
        worst = max(ratio(layer[cut].rel_error, layer[WHOLE].rel_error) for layer in layers)
        found.append({
            "tokens": options.tokens, "text": text, "layers": len(layers), "cut": cut, "density": f"{density:.4f}",
            "rel_error": f"{error:.3e}", "density_vs_whole": f"{density / whole_density:.3f}",
            "error_vs_whole": f"{ratio(error, whole_error):.3f}", "worst_error_vs_whole": f"{worst:.3f}",
        })  # fmt: skip
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory or name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--layers", type=int, nargs="+", help="by default the first, the middle and the last sparse one"
    )
    parser.add_argument("--text", nargs="+", default=["code", "prose"], help="built-in texts or files")
    parser.add_argument("--cuts", nargs="+", help=f"by default {', '.join(CUTS)}, where they are shorter")
    options = parser.parse_args()
    if options.cuts is None:
        options.cuts = [cut for cut in CUTS if int(cut.removesuffix("+")) < options.tokens]
    for cut in options.cuts:
        number = cut.removesuffix("+")
        if not number.isdecimal() or not 0 < int(number) < options.tokens:
            parser.error(f"argument --cuts: a number from 1 to {options.tokens - 1}, with + for one cut, not '{cut}'")
    return options


def main() -> None:
    options = parse()
    machine = describe()
    shared = {
        "gpu": machine["machine"], "torch": machine["torch"], "date": machine["date"], "commit": commit_name(machine),
        "model": Path(options.model).name,
    }  # fmt: skip
    try:
        found = [shared | row for text in options.text for row in rows(options, text)]
    except (CaptureError, ConfigError) as error:
        sys.exit(f"chunks.py: {error}")
    with options.out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(found)


if __name__ == "__main__":
    main()
