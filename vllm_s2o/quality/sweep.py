"""Error against density: one layer under every rule and every looseness.

A tile's exact softmax weights are computed once. Sparse attention over some of its keys is then a sum of parts of the
same products, divided by the mass of those parts:

    out = sum of w_j v_j over visited j / sum of w_j over visited j

So the history is cut into a layout's units, each unit's sum is taken once, and every rule at every looseness adds up
those that it picks. At no time is more held than one tile's weights.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import NamedTuple

import torch

from vllm_s2o import plan

from .selection import Head, RowRule, Rule, Tile, UnitRule, heads_of, tiles_of
from .selection.rule import Layout, UnitSelection

FIGURES = ("density", "masked_density", "mse", "rel_error", "retained_mass")

HEADROOM = 60.0
"""Weights are exp(logit - largest + HEADROOM): fp32 holds e^-103 to e^88. Without it all that is 104 below the largest
would be 0, and so would the mass of a tile that has not visited the largest yet. 2^20 times e^60 is below e^74."""


class Visit(NamedTuple):
    """What one rule visits of a tile, at each value of its parameter."""

    sums: torch.Tensor
    """[values, rows, size]: sum of weight times value over the visited keys."""
    mass: torch.Tensor
    """[values, rows]: sum of the weights of the visited keys."""
    pairs: torch.Tensor
    """[values] float64: visited (query, key) pairs."""
    computed: torch.Tensor
    """[values] float64: pairs that a kernel multiplies, those that it masks included."""

    @property
    def output(self) -> torch.Tensor:
        """[values, rows, size]; 0 where nothing was visited, as in the kernels."""
        return (self.sums / self.mass[..., None]).masked_fill(self.mass[..., None] == 0, 0)


class Weights(NamedTuple):
    """A tile's exact attention."""

    tile: Tile
    weights: torch.Tensor
    """[keys, rows]: softmax weights up to a factor for each row, keys 0 to the tile's end; 0 after the diagonal."""
    value: torch.Tensor
    """[keys, size]"""
    mass: torch.Tensor
    """[rows]"""
    output: torch.Tensor
    """[rows, size]: dense attention"""


def exact(head: Head, value: torch.Tensor, tile: Tile) -> Weights:
    """A tile's weights and output; value: [tokens, size]."""
    logits = head.key[: tile.end] @ head.query[tile.first : tile.end].T * head.scale
    rows = torch.arange(tile.end - tile.first, device=logits.device)
    logits[tile.first :].masked_fill_(rows[:, None] > rows, -math.inf)
    weights = logits.sub_(logits.amax(0) - HEADROOM).exp_()
    mass = weights.sum(0)
    return Weights(tile, weights, value[: tile.end], mass, weights.T @ value[: tile.end] / mass[:, None])


def causal_pairs(tile: Tile, start: int = 0) -> int:
    """Pairs of a tile with the keys from `start` on; start is at most the tile's first row."""
    return plan.causal_pairs(tile.end - tile.first, tile.end - start)


def unit_sums(tile: Weights, layout: Layout) -> tuple[torch.Tensor, ...]:
    """Weighted values and mass of the always visited part, and of each unit of the history.

    Returns:
        [rows, size], [rows], [units, rows, size], [units, rows]
    """
    start, rows = layout.start, tile.weights.shape[1]
    weights, value = tile.weights[:start], tile.value[:start]
    if layout.order is not None:
        weights, value = (t.index_select(0, layout.order) for t in (weights, value))
    if missing := layout.num_units * layout.unit - start:
        weights, value = (torch.cat([t, t.new_zeros(missing, t.shape[1])]) for t in (weights, value))
    weights = weights.view(layout.num_units, layout.unit, rows)
    value = value.view(layout.num_units, layout.unit, value.shape[1])
    inside = tile.weights[start:]
    return inside.T @ tile.value[start:], inside.sum(0), weights.transpose(1, 2) @ value, weights.sum(1)


def visit_units(tile: Weights, selections: Mapping[str, UnitSelection], whole_tile: int) -> Iterator[tuple[str, Visit]]:
    """What selections with one layout visit of a tile; whole_tile: rows that a kernel computes, of a short tile too."""
    layout = next(iter(selections.values())).layout(tile.tile)
    inside_sums, inside_mass, sums, mass = unit_sums(tile, layout)
    rows = tile.weights.shape[1]
    keys = torch.full((layout.num_units,), float(layout.unit), device=mass.device)
    if layout.num_units:
        keys[-1] -= layout.num_units * layout.unit - layout.start
    for name, selection in selections.items():
        picks = selection.picks(tile.tile, inside_mass, mass).float()
        visited, whole = (picks @ keys).double(), picks.sum(1).double() * layout.unit
        yield (
            name,
            Visit(
                inside_sums + (picks @ sums.flatten(1)).unflatten(1, sums.shape[1:]),
                inside_mass + picks @ mass,
                causal_pairs(tile.tile, layout.start) + rows * visited,
                whole_tile * (layout.computed + whole),
            ),
        )


def descending(x: torch.Tensor) -> torch.Tensor:
    """Rows sorted, largest first. On a CPU NumPy sorts ten times as fast as PyTorch."""
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True).values
    import numpy

    return torch.from_numpy(numpy.sort(x.numpy(), axis=-1)).flip(-1)


def visit_rows(tile: Weights, rules: Mapping[str, RowRule], num_tokens: int) -> Iterator[tuple[str, Visit]]:
    """What rules visit that pick keys for each row: those that weigh at least as much as the last one kept."""
    ranked = descending(tile.weights.T.contiguous())
    for name, rule in rules.items():
        counts = rule.kept(ranked, rule.values, num_tokens)
        sums, mass = [], []
        for least in ranked.gather(1, counts - 1).T:
            kept = torch.where(tile.weights >= least, tile.weights, 0)
            sums.append(kept.T @ tile.value)
            mass.append(kept.sum(0))
        pairs = counts.sum(0).double()
        yield name, Visit(torch.stack(sums), torch.stack(mass), pairs, pairs)


def visits(
    head: Head,
    value: torch.Tensor,
    rules: Mapping[str, Rule],
    tile_size: int = 128,
    chosen: Collection[int] | None = None,
) -> Iterator[tuple[Weights, dict[str, Visit]]]:
    """One head's tiles in order, or those with the `chosen` indices, and what each rule visits of them.

    Args:
        value: [tokens, size]

    Raises:
        ValueError: a rule selects for tiles of another size.
    """
    shared: dict[Hashable, dict[str, UnitSelection]] = defaultdict(dict)
    by_row = {name: rule for name, rule in rules.items() if isinstance(rule, RowRule)}
    for name, rule in rules.items():
        if isinstance(rule, UnitRule):
            if rule.tile != tile_size:
                raise ValueError(f"{name} selects for tiles of {rule.tile} queries, not of {tile_size}")
            shared[rule.layouts][name] = rule.bind(head)
    for index, tile in enumerate(tiles_of(len(head.key), tile_size)):
        if chosen is not None and index not in chosen:
            continue
        weights = exact(head, value, tile)
        found = dict(visit_rows(weights, by_row, len(head.key))) if by_row else {}
        for selections in shared.values():
            found.update(visit_units(weights, selections, tile_size))
        yield weights, found


class _Sums:
    """Running sums of one rule over a head's tiles."""

    def __init__(self) -> None:
        self.pairs = self.computed = self.squares = self.retained = torch.zeros((), dtype=torch.float64)

    def add(self, tile: Weights, visit: Visit) -> None:
        self.pairs = self.pairs + visit.pairs
        self.computed = self.computed + visit.computed
        self.squares = self.squares + (visit.output - tile.output).double().square().sum((1, 2))
        self.retained = self.retained + (visit.mass / tile.mass).double().sum(1)


def sweep(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    rules: Mapping[str, Rule],
    *,
    tile_size: int = 128,
    chosen: Collection[int] | None = None,
    progress: Callable[[int], object] = lambda pairs: None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Every rule at every value of its parameter, on one layer.

    Args:
        query: [tokens, heads, size]; key and value: [tokens, kv_heads, size]; computed in fp32.
        chosen: tiles to look at, by index: the figures are theirs alone. All by default.
        progress: told the causal pairs of each tile that is done.

    Returns:
        For each rule each of FIGURES, [heads, values] float64: visited pairs / causal pairs, the same with the pairs
        that a kernel computes and masks, mean squared difference from dense attention, that relative to the mean square
        of dense attention, and the mean over the queries of the visited keys' share in the softmax.

    Raises:
        ValueError: shapes that do not belong together, or a rule for tiles of another size.
    """
    if value.shape != key.shape:
        raise ValueError(f"key and value must be of one shape, got {list(key.shape)} and {list(value.shape)}")
    size = query.shape[2]
    group = query.shape[1] // key.shape[1]
    found: dict[str, dict[str, list]] = {name: {figure: [] for figure in FIGURES} for name in rules}
    for index, head in enumerate(heads_of(query, key, scale)):
        own = value[:, index // group].float().contiguous()
        sums = {name: _Sums() for name in rules}
        dense, causal, rows = 0.0, 0, 0
        for tile, visited in visits(head, own, rules, tile_size, chosen):
            causal += causal_pairs(tile.tile)
            rows += tile.tile.end - tile.tile.first
            dense += tile.output.double().square().sum().item()
            for name, visit in visited.items():
                sums[name].add(tile, visit)
            progress(causal_pairs(tile.tile))
        for name, total in sums.items():
            mse, rel_error = total.squares / (rows * size), total.squares / dense
            density, computed = total.pairs / causal, total.computed / causal
            figures = (density, computed, mse, rel_error, total.retained / rows)
            for figure, values in zip(FIGURES, figures, strict=True):
                found[name][figure].append(values.cpu())
    return {name: {figure: torch.stack(rows) for figure, rows in figures.items()} for name, figures in found.items()}
