"""`vllm-s2o config`: which config a model gets, whether a file can be used, what a field means."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import click

from vllm_s2o import config_reference, model, settings
from vllm_s2o.cli.options import additional_config, as_json, print_json
from vllm_s2o.config import ConfigError, ResolvedConfig, load_config, load_file
from vllm_s2o.config_errors import ADDITIONAL, FieldErrors
from vllm_s2o.config_file import Settings


@click.group(invoke_without_command=True, short_help="What a model gets, if a file is right, what fields mean.")
@click.pass_context
def config(context: click.Context) -> None:
    """Config files: what a model gets, whether a file is right, what a field means.

    \b
    Example:
      vllm-s2o config explain
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# -- show -------------------------------------------------------------------------------------------------------------


@config.command(short_help="A model's values, and where each comes from.")
@click.argument("model_name", metavar="MODEL")
@additional_config
@as_json
def show(model_name: str, additional: dict[str, Any] | None, as_json: bool) -> None:
    """The config that MODEL gets, and where each value comes from.

    MODEL is a directory or a name on Hugging Face. Values come from the file that matches the model, from one that
    the variable VLLM_S2O_CONFIG names, from --additional-config, or are defaults.

    \b
    Example:
      vllm-s2o config show .models/SmolLM2-135M-Instruct --additional-config '{"s2o": {"threshold": 0.01}}'
    """
    given = settings.part_of(additional)
    resolved = settings.load_with(settings.traits_of(model.read(model_name)), given)
    if as_json:
        print_json(_document(resolved))
        return
    for line in resolved.describe():
        click.echo(line)
    rows = [("field", "value", "from")]
    rows += [(name, json.dumps(entry["value"]), entry["origin"]) for name, entry in _values(resolved).items()]
    for number, entry in enumerate(_overrides(resolved)):
        fields = {name: value for name, value in entry.items() if name != "origin"}
        rows.append((f"layers.{number}", json.dumps(fields), entry["origin"]))
    click.echo()
    _table(rows)


def _document(resolved: ResolvedConfig) -> dict[str, Any]:
    layers = range(resolved.traits.num_layers)
    return {
        "model": dataclasses.asdict(resolved.traits),
        "source": resolved.source,
        "matched": resolved.matched,
        "named_by": resolved.named_by,
        "provenance": resolved.file.provenance.model_dump(mode="json"),  # YAML has dates
        "fields": _values(resolved),
        "layers": _overrides(resolved),
        "dense_layers": [layer for layer in layers if resolved.layer(layer) is None],
        "digest": resolved.digest(),
    }


def _values(resolved: ResolvedConfig) -> dict[str, dict[str, Any]]:
    """Dotted field -> value and origin, without the overrides of single layers."""
    dumped = resolved.file.model_dump(mode="json", include=set(Settings.model_fields) - {"layers"})
    values = {name: value for name, value in dumped.items() if name != "params"}
    values |= {f"params.{name}": value for name, value in dumped["params"].items()}
    origins = {name: _origin(resolved, resolved.origins[name]) for name in values}
    return {name: {"value": value, "origin": origins[name]} for name, value in values.items()}


def _overrides(resolved: ResolvedConfig) -> list[dict[str, Any]]:
    origins = [_origin(resolved, resolved.source)] * resolved.num_file_layers
    origins += [ADDITIONAL] * (len(resolved.file.layers) - len(origins))
    dumped = [override.model_dump(mode="json", exclude_none=True) for override in resolved.file.layers]
    return [{**fields, "origin": origin} for fields, origin in zip(dumped, origins, strict=True)]


def _origin(resolved: ResolvedConfig, origin: str) -> str:
    named = resolved.named_by is not None and origin == resolved.source
    return f"{origin} (named by {resolved.named_by})" if named else origin


# -- validate ---------------------------------------------------------------------------------------------------------


@config.command(short_help="Whether a file can be used.")
@click.argument("file", metavar="FILE")
@click.option("--model", "model_name", metavar="MODEL", help="Also check that the model has the layers and heads.")
@as_json
@click.pass_context
def validate(context: click.Context, file: str, model_name: str | None, as_json: bool) -> None:
    """Whether FILE can be used: ok, or what is wrong, a line for each field. A server ends with the first one.

    Without --model, the numbers of layers and heads are taken as they are.

    \b
    Example:
      vllm-s2o config validate configs/smollm2-135m-instruct.yaml --model .models/SmolLM2-135M-Instruct
    """
    traits = None if model_name is None else settings.traits_of(model.read(model_name))
    try:
        load_file(file) if traits is None else load_config(traits, file)
    except ConfigError as error:
        every = _every(error)
        if as_json:
            told = {"problem": str(error), "problems": every}
            print_json({"file": file, "model": model_name, "valid": False, **told})
        if len(every) == 1:
            raise
        for sentence in every:
            click.echo(f"{context.find_root().info_name}: {sentence}", err=True)
        context.exit(1)
    if as_json:
        print_json({"file": file, "model": model_name, "valid": True, "problem": None, "problems": []})
    else:
        click.echo(f"{file}: ok" + (f" for {model_name}" if model_name else ""))


def _every(error: ConfigError) -> list[str]:
    """A sentence for each field that is wrong. `load_file` raises anew, on one line, what had them."""
    cause = error.__context__
    return [" ".join(one.split()) for one in cause.every] if isinstance(cause, FieldErrors) else [str(error)]


# -- explain ----------------------------------------------------------------------------------------------------------


@config.command(short_help="What a field means and may be.")
@click.argument("field", required=False)
@as_json
def explain(field: str | None, as_json: bool) -> None:
    """What FIELD means, its type, allowed values and default; without FIELD, a list of all.

    Fields have dotted names. Those of `params` may go without that word, here as in --additional-config.

    \b
    Example:
      vllm-s2o config explain params.threshold
    """
    if field is None:
        every = config_reference.fields()
        if as_json:
            print_json([dataclasses.asdict(one) for one in every])
            return
        _table([("field", "default", "meaning"), *((one.name, _default(one), one.meaning) for one in every)])
        return
    try:
        one = config_reference.field(field)
    except ConfigError as error:
        raise click.BadArgumentUsage(str(error)) from None
    if as_json:
        print_json(dataclasses.asdict(one))
        return
    click.echo(one.name)
    for name, text in (("meaning", one.meaning), ("type", one.type), ("allowed", one.allowed)):
        click.echo(f"  {name:<8} {text}")
    click.echo(f"  default  {_default(one)}")


def _default(field: config_reference.Field) -> str:
    return "(required)" if field.required else json.dumps(field.default)


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what stands in them; the last one runs on."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())
