"""What answers hide in: real text, the same sentences over and over, and words to make needles of.

The text is Python's own documentation, from `vllm_s2o.quality.text`, of the part that no threshold is chosen by. RULER
takes essays from a site on the web instead; theirs, and ours, have nothing to do with what is asked.
"""

import re
from collections import Counter
from functools import cache
from random import Random

from ..text import beginning, pieces

NOISE = "The kettle is warm. The window is open. The street is quiet. Somebody walks by. Nothing else happens here."

CHARACTERS = 1_000_000
"""Of the text: some 230,000 tokens, so that samples begin at different places."""
LONGEST_WORD = 20
"""In characters; longer ones are rulers and addresses, and a prompt is cut to its length word by word."""


@cache
def words() -> tuple[str, ...]:
    """The text, word by word; all white space between them is the same."""
    found = beginning(pieces("prose", "held-out"), CHARACTERS).split()
    return tuple(word for word in found if len(word) <= LONGEST_WORD)


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of plain letters that the text uses more than once, in alphabetical order: some thousands."""
    found = Counter(re.findall(r"\b[a-z]{4,9}\b", " ".join(words())))
    return tuple(sorted(word for word, count in found.items() if count > 1))


@cache
def _sentence_starts() -> tuple[int, ...]:
    return tuple(i + 1 for i, word in enumerate(words()[:-1]) if word.endswith((".", "?", "!")))


def somewhere(rng: Random) -> int:
    """Index of a word that begins a sentence."""
    return rng.choice(_sentence_starts())


def text(start: int, count: int) -> list[str]:
    """`count` words from index `start` on; after the last word comes the first."""
    found = words()
    return [found[i % len(found)] for i in range(start, start + count)]


def hide(found: list[str], needles: list[str], depths: list[float]) -> str:
    """A text with sentences put between its own.

    Args:
        found: the text's words, or sentences.
        needles: in the order in which they shall stand.
        depths: where, one for each needle: 0 the beginning, 1 the end.
    """
    places = []
    for depth in sorted(depths):
        place = int(depth * len(found))
        while 0 < place < len(found) and not found[place - 1].endswith((".", "?", "!")):
            place += 1
        places.append(place)
    parts, before = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*found[before:place], needle]
        before = place
    return " ".join(parts + found[before:])
