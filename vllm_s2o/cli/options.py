"""What several subcommands take."""

import json
import math
from collections.abc import Callable
from typing import Any

import click

from vllm_s2o import settings
from vllm_s2o.config import ConfigError, ModelTraits, ResolvedConfig, load_file

TEXTS = "code, prose, dialogue, tables, needles, or a UTF-8 file; repeatable. [default: code and prose]"


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
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
