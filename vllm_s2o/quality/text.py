"""Real text of any length without a download: what every Python brings along.

    code   the standard library's sources, file after file
    prose  the language reference that help() shows, then the standard library's docstrings

Both are the same on every machine with the same Python. A path names a text of one's own.
"""

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = ("code", "prose")

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip"}
"""Folders that some distributions lack, or that hold what others installed."""


class TextError(RuntimeError):
    """Why there is no such text, in one sentence."""


def pieces(source: str) -> Iterator[str]:
    """The text in order, piece by piece, so that a short one does not read all of it.

    Args:
        source: "code", "prose" or the path of a UTF-8 file.

    Raises:
        TextError: the file cannot be read, or this Python has no sources.
    """
    if source == "code":
        for name, text in library():
            yield f"# {name}\n{text}\n"
    elif source == "prose":
        yield from prose()
    else:
        yield own(Path(source))


def library() -> Iterator[tuple[str, str]]:
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
    try:
        from pydoc_data.topics import topics
    except ImportError:  # packaged apart by some distributions
        topics = {}
    for name in sorted(topics):
        yield topics[name].strip() + "\n\n"
    for _, text in library():
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


def own(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TextError(f"The text {path} is no UTF-8 file.") from None
    except OSError as error:
        known = " and ".join(SOURCES)
        raise TextError(
            f"The text {path} cannot be read: {error.strerror}; known are {known}, or the path of a file."
        ) from None


def beginning(parts: Iterable[str], num_chars: int) -> str:
    """At most `num_chars` characters."""
    taken, length = [], 0
    for part in parts:
        taken.append(part)
        length += len(part)
        if length >= num_chars:
            break
    return "".join(taken)[:num_chars]


def first_tokens(tokenizer, source: str, count: int) -> list[int]:
    """The first `count` tokens of a text, with what the tokenizer sets before it.

    Args:
        tokenizer: one of transformers'.
        source: "code", "prose" or the path of a UTF-8 file.

    Raises:
        TextError: the text cannot be read, or is too short.
    """
    num_chars = 4 * count
    while True:
        text = beginning(pieces(source), num_chars)
        # Far more than the model's context is no mistake here, and needs no warning.
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > count:  # the last token may be half a word
            return ids[:count]
        if len(text) < num_chars:
            break
        num_chars *= 2
    if len(ids) < count:
        raise TextError(f"The text {source} has {len(ids)} tokens, fewer than {count}: give a longer one.")
    return ids
