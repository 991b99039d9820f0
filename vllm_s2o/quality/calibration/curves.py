"""Error and density of each KV head at each threshold, from a sample of a model's tiles."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy

from vllm_s2o.params import S2OParams
from vllm_s2o.plan import causal_pairs
from vllm_s2o.quality.capture import Layer, Source, visit_layers
from vllm_s2o.quality.parts import Parts, as_lists
from vllm_s2o.quality.selection.ranked import S2O
from vllm_s2o.quality.sweep import sweep

EVERY = 8
"""Of so many tiles that follow each other one is looked at."""

LEAST = 8
"""Tiles of a prompt that are looked at, at least: a short one has fewer to spare."""

TAUS = (0.0, *(float(f"{2e-4 * 1.4**step:.3g}") for step in range(24)))
"""Thresholds to choose from, up to 0.46: closer to each other than those of a frontier, and short in a file."""


class Curves(NamedTuple):
    """One layer, at every swept threshold."""

    density: numpy.ndarray
    """[num_kv_heads, thresholds]: visited / causal pairs."""
    error: numpy.ndarray
    """[num_kv_heads, thresholds]: mean squared difference from dense attention, relative to the layer's mean
    square: errors of heads add up to the layer's relative error."""


def rule_of(params: S2OParams) -> S2O:
    """The oracle of what these parameters select, at every threshold of TAUS."""
    return S2O(
        params.segment_len, ranking=params.ranking.replace("_", ""), interval=params.stop_interval,
        num_classes=params.num_classes, tile=params.tile_size, key_block=params.key_block, values=TAUS,
    )  # fmt: skip


def sample(num_tokens: int, tile: int, seed: int, prompt: str, layer: int, every: int = EVERY) -> list[int]:
    """One tile of each run of up to `every` neighbours, by chance: early and late ones have their share.

    Tiles at a fixed distance would all stand at one place of their segments: the first tile of a segment of four sees
    a quarter of the keys that the last one always visits, and every density would be wrong by that. The sample is
    another one for each prompt and layer, so that what one misses is not missed in all.
    """
    chance = random.Random(f"{seed}, {prompt}, layer {layer}")
    tiles = -(-num_tokens // tile)
    runs = max(tiles // every, min(LEAST, tiles))
    borders = [run * tiles // runs for run in range(runs + 1)]
    return [chance.randrange(first, end) for first, end in pairwise(borders)]


def measure(
    source: Source, parts: Parts, prompts: Mapping[str, list[int]], rules: Mapping[str, S2O], seed: int,
    progress: Callable[[str, int], object],
) -> None:  # fmt: skip
    """Sweep every layer on every prompt, where `parts` do not hold it yet.

    Args:
        prompts: tokens, by the name that `parts` gets.
        progress: told what is done, and 1 for each layer.
    """
    layers = range(source.traits.num_layers)
    left = {name: [layer for layer in layers if (name, layer) not in parts.done] for name in prompts}
    for name in prompts:
        progress(name, len(layers) - len(left[name]))
    if not any(left.values()):
        return
    model = source.load()
    for name, ids in prompts.items():
        if not left[name]:
            continue

        def visit(layer: Layer, name: str = name) -> None:
            query, key, value = (t.to(model.device) for t in (layer.query, layer.key, layer.value))
            tile = next(iter(rules.values())).tile
            chosen = sample(len(layer.query), tile, seed, name, layer.index)
            swept = sweep(query, key, value, layer.scale, rules, tile_size=tile, chosen=chosen)
            parts.add(name, layer.index, as_lists(swept))
            progress(name, 1)

        visit_layers(model, ids, left[name], visit)


def dense_share(num_tokens: int, params: S2OParams) -> float:
    """Of a prompt's pairs those of its dense end."""
    first = _dense_from(num_tokens, params)
    return causal_pairs(num_tokens - first, num_tokens) / causal_pairs(num_tokens, num_tokens)


def _dense_from(num_tokens: int, params: S2OParams) -> int:
    """The first position of a prompt's dense end; `num_tokens` where it has none."""
    if not params.dense_tail:
        return num_tokens
    return max(num_tokens - params.dense_tail, 0) // params.tile_size * params.tile_size


def least_density(num_tokens: int, params: S2OParams) -> float:
    """Of a prompt's pairs those that any threshold visits: its dense end, each segment's own, and of its history the
    first step, after which a tile may stop."""
    dense = _dense_from(num_tokens, params)
    pairs = causal_pairs(num_tokens - dense, num_tokens)
    step = params.stop_interval * params.key_block
    for start in range(0, dense, params.segment_len):
        rows = min(params.segment_len, dense - start)
        pairs += causal_pairs(rows, rows) + rows * min(start, step)
    return pairs / causal_pairs(num_tokens, num_tokens)


def layer_curves(
    parts: Parts, names: Sequence[str], layer: int, rule: str, num_kv_heads: int, dense: float = 0.0
) -> Curves:
    """The mean over prompts.

    Args:
        dense: share of the pairs that is visited at any threshold. What is looked at are tiles that stop; that the end
            of a prompt errs less is not counted.
    """
    density, error = [], []
    for name in names:
        figures = {figure: numpy.array(rows) for figure, rows in parts.done[name, layer][rule].items()}
        mse, relative = figures["mse"], figures["rel_error"]
        # What an error is relative to: any threshold that errs tells a head's mean square.
        at = relative.argmax(1)[:, None]
        worst, share = numpy.take_along_axis(mse, at, 1), numpy.take_along_axis(relative, at, 1)
        power = numpy.divide(worst, share, out=numpy.zeros_like(worst), where=share > 0)[:, 0]
        group = len(mse) // num_kv_heads
        density.append(figures["density"].reshape(num_kv_heads, group, -1).mean(1))
        error.append(mse.reshape(num_kv_heads, group, -1).sum(1) / max(power.sum(), 1e-30))
    return Curves(1 - (1 - numpy.mean(density, 0)) * (1 - dense), numpy.mean(error, 0))
