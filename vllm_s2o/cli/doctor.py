"""`vllm-s2o doctor`: whether serving with S2O would work here, and what to do where it would not."""

import dataclasses
import sys
from typing import Any

import click

from vllm_s2o.cli.checks import Finding
from vllm_s2o.cli.options import additional_config, as_json, print_json

COLOURS = {"ok": None, "warning": "yellow", "problem": "red"}


@click.command(short_help="Whether serving with S2O would work here.")
@click.argument("model", metavar="[MODEL]", required=False)
@additional_config
@as_json
@click.pass_context
def doctor(context: click.Context, model: str | None, additional: dict[str, Any] | None, as_json: bool) -> None:
    """Whether a server with S2O would work here; with MODEL, which config it gets and which layers are sparse.

    MODEL is a directory or a name on Hugging Face. No weights are loaded and nothing stays behind. Layers are judged
    by the model's config.json: a server's log has the last word. The status is 1 if serving would not work.

    \b
    Example:
      vllm-s2o doctor .models/SmolLM2-135M-Instruct
    """
    if additional is not None and model is None:
        raise click.UsageError("--additional-config is about a model: name one.")
    from vllm_s2o.cli.diagnosis import diagnose  # not for the other commands: it knows what PyTorch needs

    found = diagnose(model, additional, _tell)
    if as_json:
        print_json(_document(found))
    else:
        _print(found.findings)
        problems, warnings = found.count("problem"), found.count("warning")
        verdict = "Serving with S2O would work here" if found.works else "Serving with S2O would not work here"
        counts = [f"{n} {word}{'s' * (n > 1)}" for n, word in ((problems, "problem"), (warnings, "warning")) if n]
        click.echo(f"\n{verdict}{': ' if counts else ''}{', '.join(counts)}.")
    context.exit(0 if found.works else 1)


def _tell(line: str) -> None:
    """For someone who waits, not for a file or a script."""
    if sys.stderr.isatty():
        click.echo(line, err=True)


def _print(findings: tuple[Finding, ...]) -> None:
    part = None
    for finding in findings:
        if finding.part != part:
            part = finding.part
            click.echo(part)
        level = "" if finding.level == "ok" else f"{finding.level}: "
        click.echo(f"  {finding.name:<12} " + click.style(level + finding.value, fg=COLOURS[finding.level]))
        if finding.advice is not None:
            click.echo(f"  {'':<12} -> {finding.advice}")


def _document(found: Any) -> dict[str, Any]:
    """A `Diagnosis` for scripts."""
    document = {
        "works": found.works,
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
        "gpus": [dataclasses.asdict(gpu) for gpu in found.machine.gpus],
        "model": found.traits and dataclasses.asdict(found.traits),
        "config": None,
        "sparse_layers": None,
        "dense_layers": None,
    }
    if found.config is not None:
        names = ("source", "matched", "named_by", "calibrated")
        layers = range(found.traits.num_layers)
        document["config"] = {name: getattr(found.config, name) for name in names} | {"digest": found.config.digest()}
        document["sparse_layers"] = [layer for layer in layers if layer not in found.dense]
        document["dense_layers"] = {str(layer): reason for layer, reason in found.dense.items()}
    return document
