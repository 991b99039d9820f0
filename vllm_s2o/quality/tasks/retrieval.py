"""RULER's eight needle tasks: values hidden under keys, some of which are asked for at the end."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import haystack

ROOM, ROOM_NUMBER, ROOM_CODE = 24, 12, 48
"""Tokens for an answer, and in it for each value, where a token may be a single digit. RULER leaves 128 for all: what
models say after the values does not count, and on a CPU it takes longer than to read a prompt of 2K."""


@dataclass(frozen=True)
class Needles:
    """What is hidden, where, and how much of it is asked for.

    Args:
        inside: "noise", the same sentences over and over; "text"; "needles", others of the same form.
        keys: "words" or "codes".
        values: "numbers" or "codes".
        hidden: keys that are hidden.
        each: values of each key.
        asked: keys that are asked for.
    """

    inside: str
    keys: str = "words"
    values: str = "numbers"
    hidden: int = 1
    each: int = 1
    asked: int = 1


# In RULER's words: number or uuid as value, word or uuid as key, repeat, essay or needle as haystack.
TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", values="codes"),
    "niah_multikey_1": Needles("text", hidden=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", keys="codes", values="codes"),
    "niah_multivalue": Needles("text", each=4),
    "niah_multiquery": Needles("text", hidden=4, asked=4),
}


def room(form: Needles) -> int:
    """Tokens for an answer."""
    return ROOM + form.asked * form.each * (ROOM_NUMBER if form.values == "numbers" else ROOM_CODE)


def make(form: Needles, rng: Random) -> tuple[Callable[[int], tuple[str, str]], list[str]]:
    """A sample of a task: its text by the number of units, as `prompt.framed` takes it, and the values asked for.

    Units are words of a text, sentences of noise, or needles that nobody asks for.
    """
    kind = "number" if form.values == "numbers" else "code"
    used: set[str] = set()
    keys = [fresh(form.keys, rng, used) for _ in range(form.hidden)]
    values = {key: [fresh(form.values, rng, used) for _ in range(form.each)] for key in keys}
    needles = [needle(kind, key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    depths = [rng.random() for _ in needles]
    asked = rng.sample(keys, form.asked)
    units = _units(form, kind, rng, used)
    several = form.asked * form.each > 1
    named = enumerated(asked)

    def text(count: int) -> tuple[str, str]:
        hidden = haystack.hide(units(count), needles, depths)
        said = f"Secret {kind}s are hidden in the following text. Remember them: you will be asked at the end."
        if several:
            begun = f"All secret {kind}s of {named} in the text are"
            question = f"What are all the secret {kind}s of {named} in the text above? Answer with these {kind}s only."
        else:
            begun = f"The secret {kind} of {named} in the text is"
            question = f"What is the secret {kind} of {named} in the text above? Answer with this {kind} only."
        return f"{said}\n\n{hidden}\n\n{question}", begun

    return text, [value for key in asked for value in values[key]]


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the secret {kind}s of {key} is {value}."


def enumerated(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def fresh(kind: str, rng: Random, used: set[str]) -> str:
    """A key or value that no other one of the sample is."""
    while True:
        if kind == "words":
            found = "-".join(rng.sample(haystack.vocabulary(), 2))
        elif kind == "numbers":
            found = str(rng.randrange(10**6, 10**7))
        else:
            found = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if found not in used:
            used.add(found)
            return found


def _units(form: Needles, kind: str, rng: Random, used: set[str]) -> Callable[[int], list[str]]:
    """The haystack by its number of units."""
    if form.inside == "text":
        start = haystack.somewhere(rng)
        return lambda count: haystack.text(start, count)
    if form.inside == "noise":
        return lambda count: [haystack.NOISE] * count
    others: list[str] = []

    def some(count: int) -> list[str]:
        while len(others) < count:  # in the order of the generator, however often this is called
            others.append(needle(kind, fresh(form.keys, rng, used), fresh(form.values, rng, used)))
        return others[:count]

    return some
