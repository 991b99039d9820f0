"""What several subcommands take."""

import json
from collections.abc import Callable
from typing import Any

import click


class JsonObject(click.ParamType):
    """A JSON object, as vLLM's --additional-config takes it."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            given = json.loads(value)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            shown = value if len(value) <= 60 else value[:57] + "..."
            example = '{"s2o": {"threshold": 0.01}}'
            self.fail(f"allowed is a JSON object such as '{example}', not {shown!r}.", param, ctx)
        return given


def additional_config(command: Callable) -> Callable:
    return click.option(
        "--additional-config",
        "additional",
        type=JsonObject(),
        metavar="JSON",
        help="What the server would get: its option of the same name.",
    )(command)


def as_json(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for a script.")(command)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))
