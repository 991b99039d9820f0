"""Axes of a chart: where a value lies, and which values are named."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis, from `low` to `high`."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """How far along the axis a value lies, 0 to 1; beyond its ends, at them."""
        low, high, value = (math.log(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def lengths(title: str, values: Iterable[float]) -> Axis:
    """Numbers of tokens, logarithmic, named at powers of two: no more names than there is room for."""
    known = sorted(values)
    first, last = math.floor(math.log2(known[0]) + 0.05), math.ceil(math.log2(known[-1]) - 0.05)
    last = max(last, first + 1)
    step = max(1, -(-(last - first) // 8))
    ticks = tuple((2.0**power, tokens(2**power)) for power in range(first, last + 1, step))
    # Room at both ends: a length may lie a little beside a power, and its mark is wide.
    return Axis(title, 2.0 ** (first - 0.25), 2.0 ** (last + 0.25), ticks, log=True)


def tokens(count: float) -> str:
    """4096 as 4K."""
    return f"{count / 1024:.3g}K" if count >= 1024 else f"{count:g}"


def decades(title: str, values: Iterable[float], least: float = 1e-9, steps: tuple[int, ...] = (1,)) -> Axis:
    """Logarithmic, named at powers of ten, or at `steps` times them where the values span few."""
    known = sorted(max(value, least) for value in values)
    first, last = math.floor(math.log10(known[0])), math.ceil(math.log10(known[-1]))
    last = max(last, first + 1)
    steps = steps if last - first <= 3 else (1,)
    every = max(1, (last - first) // 6)
    marks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    marks = [mark for mark in marks if mark <= 10.0**last]
    return Axis(title, 10.0**first, 10.0**last, tuple((mark, number(mark)) for mark in marks), log=True)


def shares(title: str, values: Iterable[float]) -> Axis:
    """From nothing to the next tenth above the largest of some shares."""
    top = min(1.0, max(2, math.ceil(max(values) * 10 - 1e-9)) / 10)
    step = 0.1 if top <= 0.5 else 0.2
    marks = [index * step for index in range(int(top / step + 1e-9) + 1)]
    return Axis(title, 0.0, top, tuple((mark, f"{mark:.0%}") for mark in marks))


def points(title: str) -> Axis:
    """Scores, 0 to 100."""
    return Axis(title, 0.0, 100.0, tuple((float(mark), str(mark)) for mark in range(0, 101, 20)))


def number(value: float) -> str:
    """As short as it can be read."""
    return f"{value:,.10g}" if 1e-3 <= value < 1e6 else f"1e{round(math.log10(value))}"
