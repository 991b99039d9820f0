"""Thresholds that meet a budget, from curves of error and density.

A threshold is chosen for each KV head, also where its query heads have rankings of their own: a third or a quarter as
many choices, whose error is the mean over the heads. At a price
of density each head takes the threshold where error + price x density is least; one price for all heads that share a
budget spends the density where it saves most error. A budget is met by searching the price.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy

from .curves import Curves

DENSE_FROM = 0.9
"""A layer that would visit more is dense: it would cost more than it saves."""

PAYS = 0.97
"""A layer's heads have thresholds of their own if these visit at most this share of what one threshold would."""

PRICES = numpy.logspace(-9, 3, 400)
"""Relative error for all of the density, from nothing to more than any head can err."""


class CalibrationError(RuntimeError):
    """Why there is no config, in one sentence."""


class Budget(NamedTuple):
    """What may be spent: exactly one of these is given."""

    max_relative_error: float | None = None
    """Of each layer's attention, relative to its mean square."""
    target_density: float | None = None
    """Visited / causal pairs, the mean over all layers."""
    max_logit_kl: float | None = None
    """Of the next token's distribution from dense attention's, in nats."""

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self._asdict().items() if value is not None)


def unreachable(density: float, lengths: Iterable[int], least: float) -> str:
    """Why there is no config of this density."""
    segments = " or ".join(map(str, lengths))
    return (
        f"A density of {density:g} cannot be reached: with segments of {segments} tokens, at least {least:.3f} of the "
        "pairs are visited."
    )


class Choice(NamedTuple):
    """What a layer runs with."""

    at: tuple[int, ...] | None
    """Index of the swept threshold for each KV head; None: the layer is dense."""
    density: float
    error: float

    @property
    def dense(self) -> bool:
        return self.at is None


DENSE = Choice(None, 1.0, 0.0)


def take(curves: Curves, at: Sequence[int]) -> Choice:
    """These thresholds on these curves."""
    heads = numpy.arange(len(at))
    density = curves.density[heads, list(at)].mean()
    return Choice(tuple(int(i) for i in at), float(density), float(curves.error[heads, list(at)].sum()))


def at_price(curves: Curves, price: float) -> Choice:
    """The best thresholds where all of the density costs `price`."""
    return take(curves, (curves.error + price * curves.density / len(curves.density)).argmin(1))


def same_everywhere(curves: Curves, index: int) -> Choice:
    return take(curves, [index] * len(curves.density))


def within_error(curves: Curves, allowed: float) -> Choice:
    """The fewest pairs at which a layer errs at most `allowed`; dense where that is nearly all of them."""
    fits = [choice for price in PRICES if (choice := at_price(curves, price)).error <= allowed]
    single = [same_everywhere(curves, index) for index in range(curves.density.shape[1])]
    fits += [choice for choice in single if choice.error <= allowed]
    if not fits:
        return DENSE
    best = _filled(curves, min(fits, key=lambda choice: choice.density), allowed)
    return _plain(curves, best, allowed) if best.density <= DENSE_FROM else DENSE


def _filled(curves: Curves, choice: Choice, allowed: float) -> Choice:
    """What is left of the error, spent head by head: a price leaves some where no choice lies at the budget itself."""
    while True:
        at = choice.at or ()
        others = [
            take(curves, (*at[:head], index, *at[head + 1 :]))
            for head in range(len(at))
            for index in range(at[head] + 1, curves.density.shape[1])
        ]
        better = [other for other in others if other.error <= allowed and other.density < choice.density]
        if not better:
            return choice
        choice = min(better, key=lambda other: other.density)


def _plain(curves: Curves, best: Choice, allowed: float) -> Choice:
    """One threshold for all heads, unless their own save enough."""
    single = [same_everywhere(curves, index) for index in range(curves.density.shape[1])]
    single = [choice for choice in single if choice.error <= allowed]
    plain = min(single, key=lambda choice: choice.density, default=None)
    return plain if plain is not None and best.density > PAYS * plain.density else best


def within_density(layers: Sequence[Curves], density: float) -> list[Choice]:
    """The least error, all layers counted alike, at which the mean density is at most `density`; the lowest density
    that there is, where that is above it."""
    for price in PRICES:
        found = [at_price(curves, price) for curves in layers]
        if mean_density(found) <= density:
            found = [_plain(curves, choice, choice.error) for curves, choice in zip(layers, found, strict=True)]
        # What a dense layer saves in error it costs in density, at the same price.
        found = [choice if choice.density <= DENSE_FROM else DENSE for choice in found]
        if mean_density(found) <= density:
            return found
    return found


def best_single(
    layers: Sequence[Curves], kept_dense: Sequence[bool], worst: float, values: Sequence[float]
) -> tuple[float, float] | None:
    """The threshold with the lowest density that, alone, errs at most `worst` in every layer.

    It may have the same layers kept dense, or none, whichever is better for it; and it may lie between the swept
    ones, where error and density are straight in their logarithms: what it is compared with may not.

    Args:
        values: the swept thresholds.

    Returns:
        The threshold and its mean density; None where none is good enough.
    """
    found = [_single(layers, dense, worst, values) for dense in (kept_dense, [False] * len(layers))]
    return min((one for one in found if one), key=lambda one: one[1], default=None)


def _single(
    layers: Sequence[Curves], kept_dense: Sequence[bool], worst: float, values: Sequence[float]
) -> tuple[float, float] | None:
    points = []
    for index in range(len(values)):
        found = [
            DENSE if dense else same_everywhere(curves, index) for curves, dense in zip(layers, kept_dense, strict=True)
        ]
        points.append((max(choice.error for choice in found), mean_density(found)))
    fits = [index for index, (error, _) in enumerate(points) if error <= worst]
    if not fits:
        return None
    last = fits[-1]
    (error, density), after = points[last], last + 1
    if after == len(points) or min(error, values[last]) <= 0:
        return values[last], density
    share = math.log(worst / error) / math.log(points[after][0] / error)
    between = ((values[last], values[after]), (density, points[after][1]))
    threshold, density = (a ** (1 - share) * b**share for a, b in between)
    return threshold, density


def mean_density(choices: Sequence[Choice]) -> float:
    return sum(choice.density for choice in choices) / len(choices)
