"""RULER's two tasks of aggregation: the most common words of a list, the most frequent coded words of a text."""

import math
from collections.abc import Callable
from random import Random
from string import ascii_lowercase

from . import haystack

COMMON_ROOM, FREQUENT_ROOM = 100, 40
"""Tokens for an answer; RULER leaves 120 and 50."""
COMMON = 10
SHORT = 4096
"""Below, RULER's lists have 6 of each common word and 1 of others, in place of 30 and 3."""


def numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def ask_common(words: list[str]) -> tuple[str, str]:
    """Question and beginning of the answer."""
    question = (
        "Some words stand more often than others in the following numbered list. Remember those that stand most often."
        f"\n\n{numbered(words)}\n\nWhich {COMMON} words are the most common in the list above?"
    )
    return question, f"The {COMMON} most common words in the list are:"


def common(rng: Random, length: int) -> tuple[Callable[[int], tuple[str, str]], list[str]]:
    """A sample: its text by the number of units, as `prompt.framed` takes it, and the common words.

    Units are words that are not common. As in RULER, an example with its answer stands before the question.
    """
    often, seldom, of_example = (6, 1, (20, 3, 1)) if length < SHORT else (30, 3, (40, 10, 3))
    words = rng.sample(haystack.vocabulary(), len(haystack.vocabulary()))
    shown = [words.pop() for _ in range(of_example[0])]
    entries = shown[:COMMON] * of_example[1] + shown[COMMON:] * of_example[2]
    rng.shuffle(entries)
    question, begun = ask_common(entries)
    example = f"{question}\n\n{begun} {numbered(shown[:COMMON])}"
    asked = [words.pop() for _ in range(COMMON)]
    order, known = rng.random(), len(words)

    def seldom_word(place: int) -> str:
        """Those that are known, and when a long list has them all, two of them together, each pair once."""
        turn, at = divmod(place, known)
        return words[at] if not turn else f"{words[at]}-{words[(at + turn) % known]}"

    def text(count: int) -> tuple[str, str]:
        entries = asked * often + [seldom_word(place) for place in range(count)] * seldom
        Random(order).shuffle(entries)
        question, begun = ask_common(entries)
        return f"{example}\n\n{question}", begun

    return text, asked


def frequent(rng: Random) -> tuple[Callable[[int], tuple[str, str]], list[str]]:
    """A sample: its text by the number of units, as `prompt.framed` takes it, and the three most frequent words.

    Units are words of the text. The word of rank r has a share of 1 / r², up to a factor that makes these shares one;
    that of rank 1 are dots, which do not count.
    """
    coded: list[str] = []

    def word(rank: int) -> str:
        while len(coded) < rank:
            new = "".join(rng.choices(ascii_lowercase, k=6))
            if new not in coded:
                coded.append(new)
        return "..." if rank == 1 else coded[rank - 1]

    answers = [word(rank) for rank in (2, 3, 4)]
    order = rng.random()

    def text(count: int) -> tuple[str, str]:
        total, entries, rank = 6 * count / math.pi**2, [], 1
        while times := int(total / rank**2):
            entries += [word(rank)] * times
            rank += 1
        # Rounding down loses words of high rank; each has one too few to matter, and dots make up for them.
        entries += ["..."] * (count - len(entries))
        Random(order).shuffle(entries)
        question = (
            "Count how often each coded word stands in the following text; the dots are no words.\n\n"
            f"{' '.join(entries)}\n\nWhich three coded words are the most frequent in the text above? Do not explain."
        )
        return question, "The three most frequent coded words in the text are:"

    return text, answers
