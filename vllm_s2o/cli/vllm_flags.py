"""Arguments of `vllm serve` that a user gives for servers that are started here, as vLLM reads them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COMPARED = ("--attention-backend", "--attention-config", "--additional-config")
"""Flags that tell a server with S2O from one without. vLLM takes their beginnings, too."""


class Flag(NamedTuple):
    name: str
    """With hyphens, which may be written as underscores."""
    field: str
    """Of `--name.field`; else empty."""
    value: str
    """What follows, be it meant for the flag or not."""


def flags(arguments: Sequence[str]) -> Iterator[Flag]:
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("-"):
            written, joined, value = argument.partition("=")
            name, _, field = written.partition(".")
            yield Flag(name.replace("_", "-"), field, value if joined else following)


def choose_what_is_compared(arguments: Sequence[str]) -> bool:
    """Whether they name a backend or an additional config, or a file that may."""
    return any(
        name in ("-ac", "--config") or (len(name) > 2 and any(flag.startswith(name) for flag in COMPARED))
        for name, *_ in flags(arguments)
    )
