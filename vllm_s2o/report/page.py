"""The whole document, and how it comes into its file."""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .markup import Markup, el, joined
from .style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may do with the page: show it. It holds no script, and fetches nothing."""


def page(title: str, sections: Iterable[Markup], made: str) -> str:
    """The document.

    Args:
        made: by what and when, for its last line.
    """
    head = el(
        "head", el("meta", charset="utf-8"), el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="color-scheme", content="light dark"), el("title", title), el("style", Markup(STYLE)),
    )  # fmt: skip
    body = el("body", el("main", el("h1", title), joined(sections)), el("footer", el("p", made)))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def write(path: Path, text: str) -> None:
    """The file as a whole, or what was there before.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
