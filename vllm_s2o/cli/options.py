"""What several subcommands take."""

import json
from collections.abc import Callable
from typing import Any

import click

from vllm_s2o import settings
from vllm_s2o.config import ConfigError, ModelTraits, ResolvedConfig, load_file


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


def chosen_config(traits: ModelTraits, file: str | None, additional: dict[str, Any] | None) -> ResolvedConfig:
    """The config of --config, else the one that --additional-config makes of the model's own."""
    if file is None:
        return settings.load_with(traits, settings.part_of(additional))
    try:
        load_file(file)  # beforehand: what else reads it takes it for a part of --additional-config, and says so
    except ConfigError as error:
        raise ConfigError(f"--config: {error}") from None
    return settings.load_with(traits, file)


def as_json(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for a script.")(command)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))
