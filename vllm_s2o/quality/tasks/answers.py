"""The answers that were given, in a file that grows by a line for each, so that a run that was cut off goes on."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_s2o.quality.journal import Journal, JournalError

from .prompt import TaskError

Key = tuple[str, str, int, int]
"""Backend, task, length, index."""


class Answer(NamedTuple):
    text: str
    score: float
    """Between 0 and 1."""
    prompt_tokens: int
    tries: int
    """1 where the first request was answered."""


@contextlib.contextmanager
def _as_task_error() -> Iterator[None]:
    try:
        yield
    except JournalError as error:
        raise TaskError(str(error)) from error


class Answers:
    """What is kept beside the table: answers, and, for those asked together, the pairs of queries and keys that their
    prompts visited and those that they could have.

    Args:
        path: the file; it and its folder are made if they are missing.
        settings: what every answer depends on but its key.

    Raises:
        TaskError: the file holds something else, or answers under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.found: dict[Key, Answer] = {}
        self.pairs: dict[tuple[str, str, int], tuple[int, int]] = {}
        """(visited, causal) by backend, task and length, where a log told of them."""
        with _as_task_error():
            self._journal = Journal(path, settings, "answers", self._take)

    def add(
        self, backend: str, given: Iterable[tuple[tuple[str, int, int], Answer]], pairs: tuple[int, int] | None
    ) -> None:
        """Keep answers that were asked together.

        Args:
            given: task, length and index of each, all of one task and length.
            pairs: visited and causal ones of their prompts; None where nobody knows.
        """
        lines = [{"key": [backend, *key], "answer": answer._asdict()} for key, answer in given]
        if pairs is not None:
            lines[-1]["pairs"] = pairs
        for line in lines:
            self._take(line)
        with _as_task_error():
            self._journal.append(lines)

    def density(self, backend: str, groups: Mapping[tuple[str, int], int]) -> float | None:
        """Of the prompts of some tasks at some lengths, dense chunks included; None where nobody knows, as where more
        were asked than the given numbers of samples: pairs are those of all together."""
        kept = Counter(key[:3] for key in self.found)
        if any(kept[backend, *group] > count for group, count in groups.items()):
            return None
        known = [self.pairs[backend, *group] for group in groups if (backend, *group) in self.pairs]
        visited, causal = (sum(pair) for pair in zip(*known, strict=True)) if known else (0, 0)
        return visited / causal if causal else None

    def _take(self, line: dict[str, Any]) -> None:
        backend, task, length, index = line["key"]
        self.found[backend, task, int(length), int(index)] = Answer(**line["answer"])
        if "pairs" in line:
            before = self.pairs.get((backend, task, length), (0, 0))
            visited, causal = line["pairs"]
            self.pairs[backend, task, length] = before[0] + visited, before[1] + causal
