"""`vllm-s2o evaluate`: what a config costs a model."""

import functools
import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vllm_s2o import model as models
from vllm_s2o import settings
from vllm_s2o.cli import checks
from vllm_s2o.cli.options import TEXTS, additional_config, as_json, chosen_config, print_json
from vllm_s2o.cli.progress import layers_done
from vllm_s2o.cli.vllm_flags import choose_what_is_compared
from vllm_s2o.config import ENVIRONMENT, ResolvedConfig

if TYPE_CHECKING:
    from vllm_s2o.quality.tasks.table import Row

FORMATS = {
    "density": ".3f", "rel_error": ".1e", "agreement": ".2%", "kl": ".2g", "perplexity": ".3f",
    "dense_perplexity": ".3f",
}  # fmt: skip
"""Figures of `quality.cost.Cost`, as a table shows them."""


@click.command(short_help="What a config costs a model: error, density, next tokens, answers.")
@click.argument("model", metavar="MODEL")
@click.option("--config", "file", metavar="FILE", help="The config; by default the one that MODEL gets.")
@additional_config
@click.option("--text", "texts", multiple=True, metavar="TEXT", help=TEXTS)
@click.option("--split", type=click.Choice(["choosing", "held-out"]), default="held-out", show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=8192, show_default=True, help="Of each prompt.")
@click.option(
    "--tasks", "samples", type=click.IntRange(1), metavar="N",
    help="Also ask servers, with S2O and without, N prompts of --tokens of each of RULER's tasks, needles among them.",
)  # fmt: skip
@click.option("--server", type=shlex.split, default="", metavar="ARGS", help="For these, in one word.")
@as_json
def evaluate(
    model: str, file: str | None, additional: dict[str, Any] | None, texts: tuple[str, ...], split: str, tokens: int,
    samples: int | None, server: list[str], as_json: bool,
) -> None:  # fmt: skip
    """What a config costs MODEL, against dense attention on the same prompts.

    Density and error of each layer, and of the next tokens at all positions: the share that stays the same, the
    divergence of their distributions, and the perplexity of the text. MODEL runs in transformers, and is sparse
    whatever the config's min_seq_len is. With --tasks also its answers, from servers, where min_seq_len holds.

    \b
    Example:
      vllm-s2o evaluate .models/SmolLM2-135M-Instruct --text code --tokens 2048
    """
    from vllm_s2o.quality.capture import CaptureError, open_model
    from vllm_s2o.quality.cost import CostError, mean, measure, sparse_layers

    if file is not None and settings.part_of(additional) is not None:
        raise click.UsageError("--config and --additional-config cannot be given together.")
    if server and samples is None:
        raise click.UsageError("--server is for the servers of --tasks, which is not given.")
    if choose_what_is_compared(server):
        raise click.UsageError(
            "--server cannot choose the backend or the additional config, nor name a --config file: servers run with "
            "the config that is judged, and without S2O."
        )
    if samples is not None and (advice := checks.without_vllm()) is not None:
        raise click.ClickException(f"vLLM, whose servers --tasks asks, is not installed: {advice}")
    config = chosen_config(settings.traits_of(models.read(model)), file, additional)
    texts = tuple(dict.fromkeys(texts)) or ("code", "prose")
    given = _given(config, file, additional)
    costs, layers = [], {}
    try:
        sparse_layers(config)  # before minutes are spent on it
        source = open_model(model, tokens)
        prompts = {text: source.prompt(text, tokens, split) for text in texts}
        # Servers come first: they want the device's memory to themselves.
        asked = [] if samples is None else _ask(model, tokens, samples, [*_flags(given), *server])
        with layers_done(2 * config.traits.num_layers * len(texts), quiet=as_json) as progress:
            loaded = source.load()
            for text, ids in prompts.items():
                cost, layers[text] = measure(loaded, ids, config, functools.partial(progress, text))
                costs.append(cost)
    except (CaptureError, CostError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(
            {
                "model": model, "config": config.source, "digest": config.digest(), "tokens": tokens, "split": split,
                "min_seq_len": config.min_seq_len, "rope_factor": source.rope_factor,
                "mean": mean(costs)._asdict(),
                "texts": {
                    text: {**cost._asdict(), "layers": [layer._asdict() for layer in layers[text]]}
                    for text, cost in zip(texts, costs, strict=True)
                },
                "tasks": [_document(row) for row in asked],
            }
        )  # fmt: skip
        return
    for line in config.describe():
        click.echo(line)
    if tokens < config.min_seq_len:
        click.echo(
            f"A server leaves prompts of {tokens} tokens dense, below min_seq_len={config.min_seq_len}: judged is what "
            "sparse attention would do to them."
        )
    if source.extension is not None:
        click.echo(source.extension)
    names = [Path(text).name for text in texts]
    width = max(map(len, [*names, "mean"]))
    click.echo("\n" + " ".join([" " * width, *(f"{name:>16}" for name in FORMATS)]))
    shown = (
        zip([*names, "mean"], [*costs, mean(costs)], strict=True) if len(costs) > 1 else zip(names, costs, strict=True)
    )
    for name, cost in shown:
        click.echo(" ".join([f"{name:{width}}", *(f"{getattr(cost, key):>16{form}}" for key, form in FORMATS.items())]))
    worst = max((layer for found in layers.values() for layer in found), key=lambda layer: layer.rel_error)
    click.echo(
        f"\nThe layer that errs most is {worst.layer}: {worst.rel_error:.1e} at a density of {worst.density:.3f}."
    )
    if asked:
        from vllm_s2o.quality.tasks.table import summary

        click.echo(f"\nAnswers to {samples} prompts of each task:\n{summary(asked)}")
    click.echo(_servers(model, given))


def _ask(model: str, tokens: int, samples: int, server: Sequence[str]) -> list["Row"]:
    """All tasks' scores, with S2O and without."""
    from vllm_s2o.quality.tasks.prompt import TaskError
    from vllm_s2o.quality.tasks.run import measure

    with tempfile.TemporaryDirectory() as scratch:
        try:
            found, _ = measure(model, Path(scratch) / "tasks.csv", lengths=[tokens], samples=[samples], server=server)
        except TaskError as error:
            raise click.ClickException(str(error)) from error
    return found


def _document(row: "Row") -> dict[str, Any]:
    compared = {} if row.difference is None else {"difference": row.difference._asdict(), "same_answers": row.same}
    return {
        "task": row.task, "backend": row.backend, "score": row.score._asdict(), "density": row.density,
        "samples": row.samples, **compared,
    }  # fmt: skip


def _given(config: ResolvedConfig, file: str | None, additional: dict[str, Any] | None) -> Any:
    """What a server must be told under "s2o" to have the config that was judged; None where it finds that by itself."""
    fields = settings.part_of(additional)
    if file is not None or config.named_by != ENVIRONMENT:
        return file or fields
    named = os.environ[ENVIRONMENT]  # which servers that are started for tasks do not inherit
    return {"config": named, **fields} if fields else named


def _flags(given: Any) -> list[str]:
    return [] if given is None else ["--additional-config", json.dumps({"s2o": given})]


def _servers(model: str, given: Any) -> str:
    """The commands that ask a server with this config."""
    name = shlex.quote(model)
    flag = shlex.join(_flags(given))
    server = f" --server={shlex.quote(flag)}" if flag else ""
    whose = f", of a server that was started with {flag}" if flag else ""
    return (
        f"A server's answers: python -P -m vllm_s2o.quality.tasks {name} --out tasks.csv{server} asks tasks with S2O "
        f"and without; python -P -m vllm_s2o.quality.needles {name} prints a request that hides a number{whose}."
    )
