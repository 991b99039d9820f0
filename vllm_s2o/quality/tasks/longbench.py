"""LongBench v2: questions with four choices about a long text (arXiv 2412.15204, THUDM/LongBench-v2 on Hugging Face).

A sample has `context`, `question`, `choice_A` to `choice_D`, and the right letter as `answer`; also `_id`, `domain`,
`sub_domain`, `difficulty` and `length`, which are not asked for. The score is accuracy. The publisher reads the letter
out of "The correct answer is (A)", with or without parentheses; any other answer is wrong.
"""

import re
from pathlib import Path

from .external import File, Question, Record, Rule, read
from .prompt import TaskError

TASK = "longbench_v2"
SAID = "The correct answer is"
"""What the publisher's rule looks for. The answer begins with it, and with a parenthesis, so that a letter follows."""


def ask(record: Record) -> Question:
    choices = "\n".join(f"({letter}) {record[f'choice_{letter}'].strip()}" for letter in "ABCD")
    return Question(
        "The following text is followed by a question about it.",
        record["context"].strip(),
        f"{record['question'].strip()}\n{choices}\n\nWhich choice is correct? Answer with its letter.",
        f"{SAID} (",
    )


def score(answer: str, record: Record) -> bool:
    found = re.search(rf"{SAID} \(?([A-D])", f"{SAID} ({answer}".replace("*", ""))
    return found is not None and found[1] == record["answer"]


def open_file(path: Path) -> File:
    """The samples of a file.

    Raises:
        TaskError: it cannot be used.
    """
    records = read(path)
    if "choice_A" not in records[0]:
        raise TaskError(f"{path} holds no samples of LongBench v2: the first one has no field choice_A.")
    return File(TASK, Rule(128, ask, score), records)
