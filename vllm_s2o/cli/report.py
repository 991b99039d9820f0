"""`vllm-s2o report`: a page that shows what S2O does to a prompt, or what was measured."""

import datetime
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vllm_s2o import model as models
from vllm_s2o import settings
from vllm_s2o.cli import environment
from vllm_s2o.cli.options import additional_config, as_json, chosen_config, print_json
from vllm_s2o.cli.progress import layers_done
from vllm_s2o.report import bench, page, results
from vllm_s2o.version import __version__

if TYPE_CHECKING:
    from vllm_s2o.config import ResolvedConfig
    from vllm_s2o.report.prompt import Prompt

TOKENS = 8192
"""Of a text that has no end of its own."""

FOR_A_MODEL = ("prompt", "text", "layer", "head", "tokens", "file", "additional", "picture")
"""Options that say nothing without MODEL."""


@click.command(short_help="A page of what S2O does to a prompt, and of results.")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="To write.")
@click.option("--prompt", type=click.Path(path_type=Path), metavar="FILE", help="The prompt: a UTF-8 file, as it is.")
@click.option("--text", metavar="TEXT", help="Or code, prose, dialogue, tables, needles. [default: code]")
@click.option("--tokens", type=click.IntRange(2), help=f"Its first ones. [default: all of FILE, {TOKENS} of TEXT]")
@click.option("--layer", type=int, metavar="N", help="To draw. [default: the middle one of the sparse layers]")
@click.option("--head", type=int, metavar="N", help="To draw: a query head. [default: 0]")
@click.option("--config", "file", metavar="FILE", help="The config; by default the one that MODEL gets.")
@additional_config
@click.option(
    "--results", "directory", type=click.Path(path_type=Path), metavar="DIR", help="Tables, as in benchmarks/results."
)
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="The maps as a PNG.")
@click.option("--force", is_flag=True, help="Replace the files that --out and --picture name.")
@as_json
@click.pass_context
def report(
    context: click.Context, model: str | None, out: Path, directory: Path | None, picture: Path | None, force: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Write a page of one file: what S2O does to a prompt of MODEL, what was measured, or both.

    With MODEL: the attention of a layer and head before and after permutation, with the line where each tile stops,
    and density and error by layer and head. With --results: error against density, time and time to the first token
    against length. The page holds no text of the prompt, and shows without a network.

    \b
    Example:
      vllm-s2o report .models/SmolLM2-135M-Instruct --text code --tokens 2048 --out report.html
    """
    _check(context, model, out, directory, force, given | {"picture": picture})
    try:
        found = None if directory is None else results.read(directory)
    except results.ResultsError as error:
        raise click.ClickException(str(error)) from error
    prompt = None if model is None else _run(model, quiet=as_json, **given)
    sections = []
    if prompt is not None:
        from vllm_s2o.report.prompt import section

        sections.append(section(prompt))
    if found is not None:
        sections.append(bench.section(found))
    title = "S2O: " + " and ".join(
        ([f"a prompt of {Path(model).name}"] if model else []) + (["results"] if found else [])
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    page.write(out, page.page(title, sections, _made()))
    if prompt is not None and picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        _draw(prompt, picture)
    if as_json:
        print_json(_document(out, picture, prompt, found))
        return
    if prompt is not None:
        for line in _lines(prompt):
            click.echo(line)
    if found is not None and found.missing:
        click.echo(f"Not in {directory}, and so not shown: {', '.join(found.missing)}.")
    for path in (out, picture):
        if path is not None:
            click.echo(f"Written: {path}, {path.stat().st_size / 1024:,.0f} KiB.")


def _draw(prompt: "Prompt", picture: Path) -> None:
    from vllm_s2o.report import plot

    whose = f"{Path(prompt.model).resolve().name}, layer {prompt.layer}, head {prompt.head}"
    plot.draw(prompt.maps, f"{whose}: {prompt.num_tokens:,} tokens of {Path(prompt.text).name}", picture)


def _check(
    context: click.Context, model: str | None, out: Path, directory: Path | None, force: bool, given: dict[str, Any]
) -> None:
    """Refuse what no minutes of work should come before."""
    if model is None and directory is None:
        raise click.UsageError("Give MODEL, --results DIR, or both.")
    if model is None:
        for parameter in context.command.params:
            if parameter.name in FOR_A_MODEL and given[parameter.name] is not None:
                raise click.UsageError(f"{parameter.opts[0]} needs MODEL.")
    if given["prompt"] is not None and given["text"] is not None:
        raise click.UsageError("--prompt and --text cannot be given together.")
    if given["file"] is not None and settings.part_of(given["additional"]) is not None:
        raise click.UsageError("--config and --additional-config cannot be given together.")
    picture = given["picture"]
    if picture is not None:
        _check_picture(picture, out)
    for path in filter(None, (out, picture)):
        if path.exists() and not force:
            raise click.UsageError(f"{path} is there already: name another file, or add --force.")
        # Folders that are missing are made.
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise click.UsageError(f"{path} cannot be written: {folder} is no directory to write into.")


def _check_picture(picture: Path, out: Path) -> None:
    if picture.resolve() == out.resolve():
        raise click.UsageError(f"--out and --picture are both {out}: name two files.")
    if picture.suffix.lower() != ".png":
        raise click.UsageError(f"--picture writes a PNG: name a file that ends in .png, not {picture}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--picture needs matplotlib: pip install matplotlib.")


def _run(
    name: str, prompt: Path | None, text: str | None, tokens: int | None, layer: int | None, head: int | None,
    file: str | None, additional: dict[str, Any] | None, quiet: bool,
) -> "Prompt":  # fmt: skip
    """The model on its prompt."""
    from vllm_s2o.quality.capture import CaptureError
    from vllm_s2o.report import capture

    config = chosen_config(settings.traits_of(models.read(name)), file, additional)
    try:
        layer, head = capture.chosen_layer(config, layer, head or 0), head or 0
        if prompt is not None:
            source, ids = capture.read_prompt(name, prompt, tokens)
        else:
            source, ids = capture.read_text(name, text or "code", tokens or TOKENS)
        capture.check_length(config, len(ids))
        with layers_done(config.traits.num_layers, quiet=quiet) as progress:
            shown = prompt.name if prompt is not None else text or "code"
            figures, visits = capture.measure(
                source.load(), ids, config, layer, head, lambda layers: progress(shown, layers)
            )
    except (CaptureError, capture.ReportError) as error:
        raise click.ClickException(str(error)) from error
    from vllm_s2o.report import maps
    from vllm_s2o.report.prompt import Prompt

    return Prompt(
        name, str(prompt or text or "code"), len(ids), source.rope_factor, config, figures, layer, head,
        maps.draw(visits),
    )  # fmt: skip


def _made() -> str:
    known = environment.revision(Path(__file__).parents[2])
    commit = f", commit {environment.commit_name(known)[:12]}" if known["commit"] else ""
    return f"vllm-s2o {__version__}{commit}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}."


def _lines(prompt: "Prompt") -> list[str]:
    worst = max(prompt.layers, key=lambda layer: layer.rel_error)
    drawn = prompt.layers[prompt.layer]
    return [
        *prompt.config.describe(),
        "",
        f"{prompt.num_tokens} tokens of {prompt.text}: density {prompt.density:.3f}, mean over {len(prompt.layers)} "
        f"layers; the layer that errs most is {worst.layer}: {worst.rel_error:.1e} at {worst.density:.3f}.",
        f"Layer {prompt.layer}, head {prompt.head} visits {drawn.densities[prompt.head]:.3f}, which holds "
        f"{prompt.maps.kept:.2%} of the drawn queries' attention.",
    ]


def _document(
    out: Path, picture: Path | None, prompt: "Prompt | None", found: results.Results | None
) -> dict[str, Any]:
    """What the page is made of."""
    document: dict[str, Any] = {"file": str(out), "picture": picture and str(picture), "prompt": None, "results": None}
    if prompt is not None:
        document["prompt"] = {
            "model": prompt.model, "text": prompt.text, "tokens": prompt.num_tokens, "rope_factor": prompt.rope_factor,
            **_config(prompt.config), "density": prompt.density,
            "layers": [layer._asdict() for layer in prompt.layers],
            "drawn": {
                "layer": prompt.layer, "head": prompt.head, "kept": prompt.maps.kept,
                "tiles": [{"history": stop.start, "visited": stop.visited} for stop in prompt.maps.stops],
            },
        }  # fmt: skip
    if found is not None:
        rows = {name: len(table) for name, table in found.tables.items()}
        document["results"] = {"directory": str(found.directory), "rows": rows, "missing": found.missing}
    return document


def _config(config: "ResolvedConfig") -> dict[str, str]:
    return {"config": config.source, "found": config.found, "digest": config.digest()}
