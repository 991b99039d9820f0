"""RULER's two scores: how many of the expected strings an answer holds, in upper or lower case."""

import re
from collections.abc import Sequence


def cleaned(answer: str) -> str:
    """Without white space around it, and without control characters in it."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def match_all(answer: str, expected: Sequence[str]) -> float:
    """The share of `expected` that the answer holds."""
    said = cleaned(answer).lower()
    return sum(text.lower() in said for text in expected) / len(expected)


def match_part(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer holds one of `expected`, else 0."""
    said = cleaned(answer).lower()
    return float(any(text.lower() in said for text in expected))
