"""The tasks by their names in RULER, and their prompts: the same for the same tokenizer, length, index and seed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

from . import counting, retrieval, tracking
from .prompt import Framing, Prompt, TaskError, framed
from .scoring import match_all

TASKS = (*retrieval.TASKS, "vt", "cwe", "fwe")


def _made(task: str, rng: Random, length: int) -> tuple[Callable[[int], tuple[str, str]], list[str], int]:
    """Text by units, what a right answer holds, and tokens for the answer."""
    if task == "vt":
        return *tracking.make(rng), tracking.ROOM
    if task == "cwe":
        return *counting.common(rng, length), counting.COMMON_ROOM
    if task == "fwe":
        return *counting.frequent(rng), counting.FREQUENT_ROOM
    form = retrieval.TASKS[task]
    return *retrieval.make(form, rng), retrieval.room(form)


def prompt(task: str, length: int, index: int, framing: Framing, seed: int = 0) -> Prompt:
    """One sample.

    Args:
        task: one of TASKS.
        length: tokens of prompt and answer together; the prompt lacks less than a unit of its text to it.
        index: another number is another sample.

    Raises:
        TaskError: there is no such task, or it does not fit into `length`.
    """
    if task not in TASKS:
        raise TaskError(f"There is no task {task}: known are {', '.join(TASKS)}.")
    text, expected, room = _made(task, Random(f"{seed} {task} {length} {index}"), length)
    made = framed(framing, text, length, room, task=task, index=index, score=partial(match_all, expected=expected))
    if made is None:
        raise TaskError(f"The task {task} does not fit into {length} tokens: its question and answer alone take more.")
    return made


def prompts(task: str, length: int, indices: Sequence[int], framing: Framing, seed: int = 0) -> Iterator[Prompt]:
    for index in indices:
        yield prompt(task, length, index, framing, seed)
