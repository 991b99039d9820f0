"""Real text of any length without a download: what every Python brings along.

    code      the standard library's sources, file after file
    prose     the language reference that help() shows, then the standard library's docstrings
    dialogue  questions about the standard library's functions, answered from their docstrings and signatures
    tables    the standard library's functions in one table for each module, rows of Unicode's tables between them
    needles   numbers hidden between the same sentences over and over, and questions about them, answered

The words of the first four are real, but nobody spoke the dialogue or typeset the tables: these are put together,
always in the same way. The fifth is made up: what looks for single keys among a thousand alike, real text hardly shows.
All are the same on every machine with the same Python. A path names a text of one's own.

What thresholds are chosen by must not be what they are judged by: a text has a part for each, of its pieces in turn.
"""

import ast
import contextlib
import itertools
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

REAL = ("code", "prose", "dialogue", "tables")
SOURCES = (*REAL, "needles")

SPLITS = ("choosing", "held-out")
"""Parts of a text: no piece is in both, though some short docstrings are written more than once."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip"}
"""Folders that some distributions lack, or that hold what others installed."""


class TextError(RuntimeError):
    """Why there is no such text, in one sentence."""


def pieces(source: str, split: str | None = None) -> Iterator[str]:
    """The text in order, piece by piece, so that a short one does not read all of it.

    Args:
        source: one of SOURCES, or the path of a UTF-8 file.
        split: every other piece, one of SPLITS; None: all of them.

    Raises:
        TextError: the file cannot be read, this Python has no sources, or there is no such part.
    """
    if split not in (None, *SPLITS):
        raise TextError(f"A text has no part {split}: known are {' and '.join(SPLITS)}.")
    known = {"code": code, "prose": prose, "dialogue": dialogue, "tables": tables, "needles": needles}
    found = known[source]() if source in known else own(Path(source))
    yield from found if split is None else itertools.islice(found, SPLITS.index(split), None, 2)


def code() -> Iterator[str]:
    for name, text in standard_library():
        yield f"# {name}\n{text}\n"


def standard_library() -> Iterator[tuple[str, str]]:
    """Path inside the standard library and source of its modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    # The build's own settings differ from machine to machine.
    names = [n for n in names if not LEFT_OUT.intersection(n.split("/")) and not n.startswith("_sysconfigdata")]
    if not names:
        raise TextError(f"There are no sources of Python's standard library in {root}: give a text file of your own.")
    for name in names:
        try:
            yield name, (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a handful are kept in other encodings
            continue


def prose() -> Iterator[str]:
    found: dict[str, str] = {}
    with contextlib.suppress(ImportError):  # packaged apart by some distributions
        from pydoc_data.topics import topics

        found = topics
    for name in sorted(found):
        yield found[name].strip() + "\n\n"
    for _, text in standard_library():
        yield from (doc + "\n\n" for doc in docstrings(text))


def docstrings(text: str) -> Iterator[str]:
    """Of a module, its classes and its functions, from the top of the file to the end."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # modules that are only there to fail
        return
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, with_docstrings)]
    for node in sorted(found, key=lambda node: getattr(node, "lineno", 0)):
        if doc := ast.get_docstring(node):
            yield doc


class Function(NamedTuple):
    """A function of the standard library, as its source says."""

    name: str
    """With its class, where it has one."""
    line: int
    signature: str
    doc: str
    """Empty where there is no docstring."""


def functions(text: str) -> Iterator[Function]:
    """Functions of a module and methods of its classes, from the top of the file to the end."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for outer in tree.body:
        prefix, inner = (f"{outer.name}.", outer.body) if isinstance(outer, ast.ClassDef) else ("", [outer])
        for node in inner:
            if isinstance(node, kinds):
                signature = f"{node.name}({ast.unparse(node.args)})"
                yield Function(prefix + node.name, node.lineno, signature, ast.get_docstring(node) or "")


ASKED = (
    "What does {name} do?",
    "Can you tell me what {name} is for?",
    "I came across {name}. What is it?",
    "How would I use {name}?",
)


def dialogue() -> Iterator[str]:
    """A conversation for each module that documents its functions."""
    for path, text in standard_library():
        turns = [f"User: I have a question about {path}.\n\nAssistant: Go ahead.\n\n"]
        for count, function in enumerate(f for f in functions(text) if f.doc):
            asked = ASKED[count % len(ASKED)].format(name=function.name)
            turns.append(f"User: {asked}\n\nAssistant: {function.doc}\n\n")
            called = f"As {function.signature}, in line {function.line}."
            turns.append(f"User: And how is it called?\n\nAssistant: {called}\n\n")
        if len(turns) > 1:
            yield "".join(turns)


UNICODE_ROWS = 24


def tables() -> Iterator[str]:
    """A table of each module's functions, followed by rows of Unicode's character table where the last ones ended."""
    point = 0x20
    for path, text in standard_library():
        rows = [f"| {f.name} | {f.line} | {f.signature} | {f.doc.partition(chr(10))[0]} |\n" for f in functions(text)]
        if not rows:
            continue
        table = [f"Functions in {path}\n\n| name | line | signature | purpose |\n|---|---|---|---|\n", *rows]
        table.append("\ncode point,name,category,bidirectional,numeric\n")
        while len(table) < len(rows) + 2 + UNICODE_ROWS:
            if name := unicodedata.name(char := chr(point), ""):
                kind = f"{unicodedata.category(char)},{unicodedata.bidirectional(char)}"
                table.append(f"U+{point:04X},{name},{kind},{unicodedata.numeric(char, '')}\n")
            point = (point + 1) % 0x20000  # beyond, names are numbers
        yield "".join(table) + "\n"


HAY = "The river is wide. Rain falls on the roofs. A train leaves for the coast. The lamps are lit. Nobody hurries."
"""Other sentences than those of the tasks (`tasks.haystack`), by which thresholds are judged."""


def needles() -> Iterator[str]:
    """Each piece hides a number, and asks for one that it or an earlier piece of its part of the text has hidden."""
    rng = Random(0)
    hidden: list[tuple[str, int]] = []
    for count in itertools.count():
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))
        number = rng.randrange(10**6, 10**7)
        hidden.append((name, number))
        asked, answer = hidden[rng.randrange(count % 2, count + 1, 2)]
        hay = [HAY] * rng.randint(1, 6)
        hay.insert(rng.randint(0, len(hay)), f"The number of {name} is {number}.")
        yield f"{' '.join(hay)}\n\nWhat is the number of {asked}? It is {answer}.\n\n"


def own(path: Path) -> Iterator[str]:
    """A file in two pieces, cut at the line in its middle."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TextError(f"The text {path} is no UTF-8 file.") from None
    except OSError as error:
        raise TextError(
            f"The text {path} cannot be read: {error.strerror}; known are {', '.join(SOURCES)}, or the path of a file."
        ) from None
    middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
    yield from (text[:middle], text[middle:])


def beginning(parts: Iterable[str], num_chars: int) -> str:
    """At most `num_chars` characters."""
    taken, length = [], 0
    for part in parts:
        taken.append(part)
        length += len(part)
        if length >= num_chars:
            break
    return "".join(taken)[:num_chars]


def first_tokens(tokenizer: Any, source: str, count: int, split: str | None = None) -> list[int]:
    """The first `count` tokens of a text, with what the tokenizer sets before it.

    Args:
        tokenizer: one of transformers'.
        source, split: as in `pieces`.

    Raises:
        TextError: the text cannot be read, or is too short.
    """
    num_chars = 4 * count
    while True:
        text = beginning(pieces(source, split), num_chars)
        # Far more than the model's context is no mistake here, and needs no warning.
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > count:  # the last token may be half a word
            return ids[:count]
        if len(text) < num_chars:
            break
        num_chars *= 2
    if len(ids) < count:
        part = f"{source} ({split})" if split else source
        raise TextError(f"The text {part} has {len(ids)} tokens, fewer than {count}: give a longer one.")
    return ids
