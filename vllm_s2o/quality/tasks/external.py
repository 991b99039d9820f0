"""Samples out of files that someone downloaded: InfiniteBench and LongBench v2, each as its publisher gives it.

Questions are asked in our words, about what the files say, and answers are judged by the publishers' rules: S2O and
dense attention can be compared by them, but figures in their lists were got with other words. A text that does not fit
is cut in the middle, as theirs are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .prompt import Framing, Prompt, TaskError

Record = dict[str, Any]
"""A sample, as its file has it."""


class Question(NamedTuple):
    """A sample in our words."""

    before: str
    text: str
    """What may be cut."""
    after: str
    begun: str
    """How the answer begins."""


class Rule(NamedTuple):
    """How samples of a kind are asked and judged."""

    room: int
    """Tokens for the answer."""
    ask: Callable[[Record], Question]
    score: Callable[[str, Record], float]


class File(NamedTuple):
    """The samples of a file: one task."""

    task: str
    rule: Rule
    records: list[Record]

    def prompts(self, length: int, indices: Sequence[int], framing: Framing) -> Iterator[Prompt]:
        """Some samples, with their texts cut so that prompt and answer have at most `length` tokens.

        Raises:
            TaskError: a question alone has more, or a sample lacks a field.
        """
        for index in indices:
            record = self.records[index]
            try:
                question = self.rule.ask(record)
                if not isinstance(question.text, str):
                    raise TypeError(f"its text is {type(question.text).__name__}, not a string")
                self.rule.score("", record)  # a missing answer would be told only after the model's
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise TaskError(
                    f"Sample {index} of {self.task} lacks a field, or has another one: {error!r}."
                ) from error
            ids = cut(question, framing, length - self.rule.room)
            if ids is None:
                raise TaskError(f"Sample {index} of {self.task} does not fit into {length} tokens without any text.")

            def score(answer: str, record: Record = record) -> float:
                return float(self.rule.score(answer.strip(), record))

            yield Prompt(self.task, length, index, ids, self.rule.room, score)


def cut(question: Question, framing: Framing, most: int) -> list[int] | None:
    """The tokens of a question, at most `most`; of its text the beginning and the end are kept, the same share of each.

    None where the question does not fit without its text.
    """

    def build(text: str) -> list[int]:
        return framing.ids(f"{question.before}\n\n{text}\n\n{question.after}".strip(), question.begun)

    if len(ids := build(question.text)) <= most:
        return ids
    tokens = framing.tokenizer(question.text, add_special_tokens=False, verbose=False).input_ids
    kept = len(tokens) - (len(ids) - most)
    while kept > 0:
        half = kept // 2
        text = framing.tokenizer.decode(tokens[: kept - half]) + framing.tokenizer.decode(tokens[len(tokens) - half :])
        ids = build(text)
        if len(ids) <= most:
            return ids
        kept -= len(ids) - most  # where the halves meet there may be more tokens than before
    ids = build("")
    return ids if len(ids) <= most else None


def read(path: Path) -> list[Record]:
    """The samples of a file: one JSON object in each line, or a JSON array of them.

    Raises:
        TaskError: there is no such file, or it holds something else.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is no UTF-8 file.") from error
    try:
        if whole.lstrip().startswith("["):
            found = json.loads(whole)
        else:
            found = [json.loads(line) for line in whole.split("\n") if line.strip()]
    except ValueError as error:
        raise TaskError(f"{path} holds neither JSON lines nor a JSON array: {error}.") from error
    if not found or not all(isinstance(record, dict) for record in found):
        raise TaskError(f"{path} holds no samples: they are JSON objects, one in each line or all in an array.")
    return found
