"""A prompt with what a right answer holds, in tokens of the model that is asked, cut to a length."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_UNITS = 64
"""In a token: a text that has more of them and still fits does not grow with them."""


class TaskError(RuntimeError):
    """Why there is no table, in one sentence."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and how the answer is judged."""

    task: str
    length: int
    """The longest that prompt and answer may be together, in tokens."""
    index: int
    """Of the task's samples at this length."""
    ids: list[int]
    room: int
    """Tokens that the answer may take: `len(ids) + room <= length`."""
    score: Callable[[str], float]
    """From an answer to a score between 0 and 1."""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.length, self.index


class Framing:
    """How a model is asked: by its chat template, with the beginning of the answer put into its mouth.

    RULER asks in the same way: a model that explains itself at length would run out of tokens before the answer.

    Args:
        tokenizer: one of transformers'.
        chat: False asks in plain text, as does a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, chat: bool = True):
        self.tokenizer = tokenizer
        self.chat = chat and bool(getattr(tokenizer, "chat_template", None))

    def ids(self, question: str, begun: str) -> list[int]:
        """Tokens of a prompt.

        Args:
            begun: how the answer begins; the model goes on from there.
        """
        if not self.chat:
            return self.tokenizer(f"{question}\n\n{begun}", verbose=False).input_ids
        messages = [{"role": "user", "content": question}]
        # Templates of models that think first have a switch for it; others do not look at it.
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self.tokenizer(text + begun, add_special_tokens=False, verbose=False).input_ids


def longest(build: Callable[[int], list[int]], most: int) -> list[int] | None:
    """The tokens of the longest prompt that fits: with one unit more it would not.

    Args:
        build: tokens of a prompt by the number of units in it; more units take more tokens.
        most: tokens that a prompt may have.

    Returns:
        None where not even a prompt without units fits.
    """
    fits, found = 0, build(0)
    if (empty := len(found)) > most:
        return None
    # Almost every unit takes the same number of tokens: the next guess is as far as the last one was off, and further
    # the more often it ended on the same side, so that what is sought is soon between two guesses. Should it not be,
    # halving does.
    fails, rate, off, repeated, guesses = None, 8.0, float(most - empty), 0, 0
    while fails is None or fails - fits > 1:
        if fits > MOST_UNITS * most:
            raise TaskError(f"A text of {fits} units has no more than {len(found)} tokens: it does not grow any more.")
        step = max(1, math.ceil(abs(off) / rate)) + 2**repeated - 1
        tried = fits + step if off >= 0 or fails is None else fails - step
        if fails is not None:
            tried = min(max(tried, fits + 1), fails - 1) if guesses < 8 else (fits + fails) // 2
        ids = build(tried)
        side = len(ids) <= most
        repeated = repeated + 1 if fails is not None and side == (off >= 0) else 0
        off = most - len(ids)
        if side:
            fits, found = tried, ids
        else:
            fails = tried
        rate, guesses = max((len(ids) - empty) / tried, 0.01), guesses + 1
    return found


def framed(
    framing: Framing, text: Callable[[int], tuple[str, str]], length: int, room: int, **fields: Any
) -> Prompt | None:
    """A prompt that with its answer fills `length` tokens, but for less than a unit of its text.

    Args:
        text: question and beginning of the answer, by the number of units.
        fields: the others of `Prompt`.

    Returns:
        None where the text does not fit even without units.
    """
    ids = longest(lambda units: framing.ids(*text(units)), length - room)
    return None if ids is None else Prompt(length=length, room=room, ids=ids, **fields)
