"""RULER's variable tracking: one value handed on from variable to variable, between sentences of noise."""

from collections.abc import Callable
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from . import haystack

ROOM = 30
"""Tokens for an answer, as in RULER."""
VARIABLES = 5
"""In a chain: the first gets a number, four hops follow."""
EXAMPLE_SENTENCES = 2


def chain(rng: Random, letters: int) -> tuple[list[str], str, list[str]]:
    """Names of variables, the number, and the assignments."""
    names: list[str] = []
    while len(names) < VARIABLES:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    number = str(rng.randrange(10_000, 100_000))
    hops = [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    return names, number, [f"VAR {names[0]} = {number}.", *hops]


def ask(context: str, number: str) -> tuple[str, str]:
    """Question and beginning of the answer."""
    question = (
        "Variables are assigned in the following text, some of them the value of another one. Follow the assignments."
        f"\n\n{context}\n\nWhich variables have the value {number} in the text above? Name all of them."
    )
    return question, f"{VARIABLES} variables have the value {number} in the text:"


def make(rng: Random) -> tuple[Callable[[int], tuple[str, str]], list[str]]:
    """A sample: its text by the number of units, as `prompt.framed` takes it, and the variables.

    Units are sentences of noise. As in RULER, an example with its answer stands before the question; its variables
    have other names.
    """
    names, number, statements = chain(rng, 3)
    depths = [rng.random() for _ in statements]
    question, begun = ask(haystack.hide([haystack.NOISE] * EXAMPLE_SENTENCES, statements, depths), number)
    example = f"{question}\n\n{begun} {' '.join(names)}"
    names, number, statements = chain(rng, 5)
    depths = [rng.random() for _ in statements]

    def text(count: int) -> tuple[str, str]:
        question, begun = ask(haystack.hide([haystack.NOISE] * count, statements, depths), number)
        return f"{example}\n\n{question}", begun

    return text, names
