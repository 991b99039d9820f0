"""Axes of a chart: where a value lies, and which values are named."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST = 1e-9
"""An error of 0 has no place on a logarithmic axis."""


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


def decades(title: str, values: Iterable[float], unit: str = "") -> Axis:
    """Logarithmic, from 1, 2 or 5 times a power of ten to another; at least a decade."""
    known = sorted(max(value, LEAST) for value in values)
    low = max(mark for mark in _marks(known[0]) if mark <= known[0] * 1.0001)
    high = min(mark for mark in _marks(known[-1]) if mark >= max(known[-1] * 0.9999, 10 * low))
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2.1 else (1,)
    every = max(1, -(-(last - first) // 7))
    marks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    name = duration if unit == "ms" else number
    inside = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
    return Axis(title, low, high, tuple((mark, name(mark)) for mark in inside), log=True)


def _marks(value: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around a value."""
    power = math.floor(math.log10(value))
    return [step * 10.0**exponent for exponent in range(power - 1, power + 3) for step in (1, 2, 5)]


def shares(title: str, values: Iterable[float]) -> Axis:
    """From nothing to the next tick above the largest of some shares."""
    top = min(1.0, max(values))
    step = 0.1 if top <= 0.5 else 0.2
    count = max(2, math.ceil(top / step - 1e-9))
    return Axis(title, 0.0, count * step, tuple((index * step, f"{index * step:.0%}") for index in range(count + 1)))


def points(title: str) -> Axis:
    """Scores, 0 to 100."""
    return Axis(title, 0.0, 100.0, tuple((float(mark), str(mark)) for mark in range(0, 101, 20)))


def number(value: float) -> str:
    """As short as it can be read."""
    return f"{value:,.10g}" if 1e-3 <= value < 1e6 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def duration(milliseconds: float) -> str:
    """To three digits."""
    return f"{milliseconds / 1000:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"
