"""Curves of error over density, and what they say at a density or an error that was not swept."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

DENSITIES = (0.1, 0.15, 0.2, 0.3)
ERRORS = (1e-2, 3e-3)
"""Relative errors."""

SMALLEST = 1e-30
"""An error of 0 has no logarithm."""

EXACT = 1e-9
"""A relative error below is that of other sums: what is visited there is all that counts."""


class Point(NamedTuple):
    """Means over heads, layers and texts at one value of a method's parameter."""

    density: float
    masked_density: float
    mse: float
    rel_error: float
    retained_mass: float


Curve = tuple[Point, ...]
"""By density, ascending."""


def mean_curve(sweeps: Iterable[Mapping[str, Sequence[Sequence[float]]]]) -> Curve:
    """The mean over all heads of some sweeps, for each value of the parameter.

    Args:
        sweeps: of one method: for each field of Point [heads, values].
    """
    heads = [
        list(zip(*(sweep[figure][head] for figure in Point._fields), strict=True))
        for sweep in sweeps
        for head in range(len(sweep["density"]))
    ]
    means = [
        [sum(figures) / len(heads) for figures in zip(*points, strict=True)] for points in zip(*heads, strict=True)
    ]
    return tuple(sorted(Point(*point) for point in means))


def between(a: Point, b: Point, share: float) -> Point:
    """A point on the way from a to b: straight in the logarithms of density and error, and in the retained mass."""

    def logarithmic(x: float, y: float) -> float:
        return math.exp((1 - share) * math.log(max(x, SMALLEST)) + share * math.log(max(y, SMALLEST)))

    found = Point(*map(logarithmic, a, b))
    return found._replace(retained_mass=(1 - share) * a.retained_mass + share * b.retained_mass)


def share_of(wanted: float, a: float, b: float) -> float:
    """How far `wanted` is on the way from a to b, in logarithms."""
    a, b, wanted = (math.log(max(x, SMALLEST)) for x in (a, b, wanted))
    return (wanted - a) / (b - a) if a != b else 0.0


def _known(a: Point, b: Point) -> bool:
    """Whether the curve goes straight from a to b. Between a point that errs and one that does not, no line tells by
    how much: the logarithm of nothing has no end."""
    return not b.rel_error < EXACT <= a.rel_error


def at_density(curve: Curve, density: float) -> Point | None:
    """The curve at a density; None where the sweep has none as low, or none as high, or nothing that errs as high."""
    for a, b in itertools.pairwise(curve):
        if density in (a.density, b.density):
            return a if density == a.density else b
        if a.density < density < b.density:
            if not _known(a, b):
                return None
            return between(a, b, share_of(density, a.density, b.density))._replace(density=density)
    return None


def at_error(curve: Curve, error: float) -> Point | None:
    """The lowest density with a relative error; None where the sparsest point errs less, or the densest one that errs
    at all more."""
    for a, b in itertools.pairwise(curve):
        if b.rel_error <= error < a.rel_error:
            if not _known(a, b):
                return None
            return between(a, b, share_of(error, a.rel_error, b.rel_error))._replace(rel_error=error)
    return None


def matched(curve: Curve) -> list[Point]:
    """The curve at DENSITIES and at ERRORS, as far as it has them."""
    points = [*(at_density(curve, d) for d in DENSITIES), *(at_error(curve, e) for e in ERRORS)]
    return [point for point in points if point is not None]
