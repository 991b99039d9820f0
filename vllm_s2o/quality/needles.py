"""Prompts that hide a number in plain text and ask for it at the end."""

import random
from collections.abc import Callable
from dataclasses import dataclass

WHO = "The gardener,A retired captain,My neighbour,The young teacher,An old fisherman,The village baker,Our librarian"
DID = "walked along,wrote about,remembered,painted,repaired,described,measured,visited,talked of,looked after"
WHAT = "the narrow bridge,a wooden boat,the stone wall,an empty market,a field of barley,the winter road,the old mill"
WHEN = "at dawn,in late autumn,after the rain,on a windy day,when the bells rang,under a grey sky,early in spring"
WORDS = tuple(words.split(",") for words in (WHO, DID, WHAT, WHEN))


@dataclass(frozen=True)
class Needle:
    """A prompt that hides a number, and the number."""

    name: str
    prompt: str
    number: str


def filler(num_tokens: int, seed: int, count: Callable[[str], int]) -> list[str]:
    """Plain sentences, few of them the same, of `num_tokens` tokens together."""
    rng, sentences, tokens = random.Random(seed), [], 0
    while tokens < num_tokens:
        sentence = " ".join(rng.choice(words) for words in WORDS) + "."
        sentences.append(sentence)
        tokens += count(" " + sentence)
    return sentences


def needle(num_tokens: int, depth: float, seed: int, count: Callable[[str], int]) -> Needle:
    """A prompt of about `num_tokens` tokens with its chat template.

    Args:
        depth: where the number stands: 0 the beginning, 1 the end.
        count: number of tokens of a text.
    """
    number = str(random.Random(f"{num_tokens} {depth} {seed}").randint(10_000, 99_999))
    sentences = filler(num_tokens - 120, seed, count)
    sentences.insert(int(len(sentences) * depth), f"The special magic number for the lighthouse is: {number}.")
    prompt = (
        "A special magic number is hidden in the following text. Remember it: you will be asked for it at the end.\n\n"
        + " ".join(sentences)
        + "\n\nWhat is the special magic number for the lighthouse mentioned in the text? Answer with the number only."
    )
    return Needle(f"{num_tokens} tokens, depth {depth:.0%}", prompt, number)
