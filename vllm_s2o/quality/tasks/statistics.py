"""Means of scores with 95 % intervals that stay honest for few samples, and where all of them are the same.

The textbook interval of ten right answers out of ten has no width. So samples that were not observed are added before
the spread is computed: two right and two wrong ones for a score (Agresti and Coull, 1998), half a better one, half a
worse one and one that is the same for a difference (Agresti and Min, 2005). Both were made for right or wrong; for
shares between they hold as well, as no value lies outside.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964
"""Of the normal distribution: 95 % lie within."""


class Estimate(NamedTuple):
    """In points, 0 to 100, or -100 to 100 for a difference."""

    mean: float
    low: float
    high: float

    @property
    def ci95(self) -> float:
        """From the mean to the farther end of the interval."""
        return max(self.high - self.mean, self.mean - self.low)


def score(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean over tasks of their mean scores.

    Args:
        groups: for each task, the scores of its samples, 0 to 1.
    """
    return _estimate(groups, (0.0, 0.0, 1.0, 1.0), (1.0,) * 4, 0.0)


def difference(groups: Sequence[Sequence[tuple[float, float]]]) -> Estimate:
    """The mean over tasks of their mean differences, by prompts that both answered.

    Args:
        groups: for each task, (score, score of what it is compared with) of its samples.
    """
    differences = [[one - other for one, other in group] for group in groups]
    return _estimate(differences, (-1.0, 0.0, 1.0), (0.5, 1.0, 0.5), -1.0)


def _estimate(
    groups: Sequence[Sequence[float]], added: Sequence[float], weights: Sequence[float], least: float
) -> Estimate:
    """The mean of means of groups; only the spread inside of groups makes it uncertain, for the tasks are given.

    Args:
        added, weights: samples that were not observed, and how much each counts.
        least: the least value that there can be; the greatest is 1.
    """
    means = [sum(group) / len(group) for group in groups]
    mean = sum(means) / len(means)
    # Each group counts the same, whatever it holds: so many samples in groups of one size would tell as much.
    observed = len(groups) ** 2 / sum(1 / len(group) for group in groups)
    count = observed + sum(weights)
    middle = sum(weight * value for value, weight in zip(added, weights, strict=True))
    # The centre of the interval: nearer to the middle of what can be than the mean is.
    centre = (mean * observed + middle) / count
    # The variance of the mean of means, times the square of that number: in groups of one size the sum of the squares.
    inside = [sum((value - at) ** 2 for value in group) for group, at in zip(groups, means, strict=True)]
    spread = sum(squares / len(group) ** 2 for squares, group in zip(inside, groups, strict=True))
    spread *= (observed / len(groups)) ** 2
    spread += observed * (mean - centre) ** 2
    spread += sum(weight * (value - centre) ** 2 for value, weight in zip(added, weights, strict=True))
    half = Z * math.sqrt(spread) / count
    return Estimate(100 * mean, 100 * max(centre - half, least), 100 * min(centre + half, 1.0))
