"""InfiniteBench (arXiv 2402.13718, xinrongzhang2022/InfiniteBench on Hugging Face): one file for each of its tasks.

A sample has `context`, `input` (the question), `answer` (a list) and `options` (a list, empty but for choices). Eight
tasks have answers that match or do not, and are scored here by the publisher's rules. The four others are not: books'
summaries take ROUGE, free answers about books an F1 of words, and running sums answers of 30,000 tokens.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .external import File, Question, Record, Rule, read
from .prompt import TaskError

LETTERS = "ABCD"
REFUSED = {
    "longbook_sum_eng": "summaries are scored by ROUGE",
    "longbook_qa_eng": "free answers are scored by an F1 of their words",
    "longbook_qa_chn": "free answers are scored by an F1 of their characters",
    "math_calc": "an answer takes 30,000 tokens",
}


def words(answer: str, marks: str) -> list[str]:
    """An answer's words, where these marks stand for spaces."""
    return answer.translate(str.maketrans(marks, " " * len(marks))).split()


def first(record: Record) -> Any:
    """The answer, which some files give as a list of one."""
    answer = record["answer"]
    return answer[0] if isinstance(answer, list) else answer


def letter(record: Record) -> str:
    """Of the right option."""
    return LETTERS[record["options"].index(first(record))]


def first_digits(answer: str, record: Record) -> bool:
    found = re.search(r"[0-9]+", answer)
    return found is not None and found[0] == str(first(record))


def first_number(answer: str, record: Record) -> bool:
    right = float(first(record))
    found = re.search(r"\d+\.\d+|\d+", answer)
    return found is not None and float(found[0]) == right


def last_number(answer: str, record: Record) -> bool:
    right, said = int(first(record)), words(answer, "\n.`'\":")
    return bool(said) and re.fullmatch(r"[-+]?\d+", said[-1]) is not None and int(said[-1]) == right


def has_word(answer: str, record: Record) -> bool:
    return str(first(record)) in words(answer, "\n:\"'.,?!{}")


def has_name(answer: str, record: Record) -> bool:
    return str(first(record)) in [word.upper() for word in words(answer, "\n:\"'.,?!{}")]


def after(answer: str, phrases: tuple[str, ...]) -> str | None:
    """What follows the first of the phrases that an answer holds, one character later; None without any."""
    for phrase in phrases:
        _, found, rest = answer.partition(phrase)
        if found:
            return rest[1:]
    return None


def chose_function(answer: str, record: Record) -> bool:
    right = letter(record)
    if answer[:2] in (f"{right}.", f"{right}:"):
        return True
    # The model goes on after these words: it does not say them itself.
    said = " ".join(words(re.sub("[Oo]ption", " ", f"answer is: {answer}"), "\n`'\"-*"))
    rest = after(said, ("answer is:", "is:", "answer:"))
    return rest is not None and rest.startswith((right, str(first(record))))


def chose_option(answer: str, record: Record) -> bool:
    right = letter(record)
    if answer[:1] and answer[0] in LETTERS:
        return answer[0] == right
    said = words(answer, "\n\"'.,?!{}")
    rest = after(" ".join(said), ("answer is:", "answer:", "answer is", "option is"))
    if rest is not None:
        return rest.startswith((right, str(first(record))))
    return next((word for word in said if word in LETTERS), None) == right


def options(record: Record) -> str:
    return "\n".join(f"{name}. {option}" for name, option in zip(LETTERS, record["options"], strict=True))


def about(said: str, begun: str, asked: str = "{input}") -> Callable[[Record], Question]:
    """A question about a text; `asked` may name fields of the sample, and {options}."""

    def ask(record: Record) -> Question:
        fields = {"input": record["input"], "options": options(record) if "{options}" in asked else ""}
        return Question(said, record["context"], asked.format(**fields).strip(), begun)

    return ask


def called(record: Record) -> Question:
    """The value of a function's call: the question names it as func_12(-3)."""
    found = re.search(r"func_\d+\(-?\d+\)", record["input"])
    if found is None:
        raise ValueError(f"no call of a function in {record['input'][:60]!r}")
    call = found[0]
    return Question(
        "These functions are written in Python.", record["context"], f"What does {call} return?", f"{call} returns"
    )


_HIDDEN = "Something important is hidden in text that does not matter. Find it: you will be asked for it."
# Tokens for answers are the publisher's.
RULES = {
    "passkey": Rule(6, about(_HIDDEN, "The pass key is"), first_digits),
    "number_string": Rule(12, about(_HIDDEN, "The sequence of digits is"), first_digits),
    "kv_retrieval": Rule(50, about("This JSON object holds keys and values.", "The value is"), has_word),
    "math_find": Rule(3, about("This is a list of numbers.", "The number is"), first_number),
    "code_run": Rule(5, called, last_number),
    "code_debug": Rule(
        5,
        about(
            "In one function of this code an error was put on purpose.",
            "The answer is:",
            "Which function has the error?\n{options}",
        ),
        chose_function,
    ),
    "longbook_choice_eng": Rule(
        40,
        about(
            "Read this book.", "The right option is", "{input}\n{options}\n\nOne of these options is right: which one?"
        ),
        chose_option,
    ),
    "longdialogue_qa_eng": Rule(
        40,
        about(
            "In this script the name of a character is replaced by $$MASK$$ at one place.",
            "The name behind $$MASK$$ is",
            "Which character is $$MASK$$? Answer with the name only.",
        ),
        has_name,
    ),
}


def open_file(path: Path) -> File:
    """The samples of a file, which has its publisher's name: passkey.jsonl and so on.

    Raises:
        TaskError: it cannot be used, or its task is not scored here.
    """
    name = path.stem
    if name in REFUSED:
        raise TaskError(f"The task {name} of InfiniteBench is not scored here: {REFUSED[name]}.")
    if name not in RULES:
        known = ", ".join(RULES)
        raise TaskError(f"{path} is named after no task of InfiniteBench: known are {known}, each with .jsonl.")
    return File(f"infinitebench_{name}", RULES[name], read(path))
