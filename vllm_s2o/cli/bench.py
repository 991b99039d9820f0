"""`vllm-s2o bench`: vLLM's own tools, with S2O and without."""

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from vllm_s2o import model as models
from vllm_s2o import settings
from vllm_s2o.cli import checks
from vllm_s2o.cli.environment import describe
from vllm_s2o.cli.options import additional_config, as_json, print_json
from vllm_s2o.cli.progress import layers_done
from vllm_s2o.cli.server import OURS, Server, ServerError
from vllm_s2o.cli.vllm_bench import BenchError, Load, at_once, bench_engine, bench_serve
from vllm_s2o.cli.vllm_flags import choose_what_is_compared, flags
from vllm_s2o.step_log import pairs

WITHOUT = "without"
WITH = "S2O"
FIGURES = {
    "median_ttft_ms": ("time to the first token, median ms", ".1f"),
    "p99_ttft_ms": ("the same, 99th percentile", ".1f"),
    "median_tpot_ms": ("time per further token, median ms", ".2f"),
    "tokens_per_s": ("tokens a second, prompts included", ".1f"),
    "density": ("density of long prefills", ".3f"),
}
"""What the table shows, where a tool has measured it."""
MORE_IS_BETTER = ("tokens_per_s",)
START_SECONDS = 900
TOKENS, PROMPTS = 8192, 5
"""Unless the context is shorter, or more prompts are asked at a time."""


class Run(NamedTuple):
    """One tool with one load; the same for both."""

    tool: str
    load: Load

    @property
    def title(self) -> str:
        load = self.load
        how = f"{load.concurrency} at a time" if self.tool == "serve" else "all at once"
        return (
            f"vllm bench {self.tool}: {load.prompts} prompts of {load.prompt_len} tokens, {load.output_len} out, {how}"
        )


@click.command(short_help="vLLM's own benchmarks, with S2O and without, side by side.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--tool", "tools", multiple=True, type=click.Choice(["serve", "throughput"]),
    help="Of `vllm bench`; both if not given.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(1), multiple=True,
    help=f"Of each prompt; repeatable. [default: {TOKENS}, or what the model's context holds]",
)  # fmt: skip
@click.option("--output", type=click.IntRange(1), default=16, show_default=True, help="Tokens of each answer.")
@click.option(
    "--prompts", type=click.IntRange(1), help=f"Of each run. [default: {PROMPTS}, or --concurrency if that is more]"
)
@click.option(
    "--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Prompts at a time, of serve."
)
@click.option("--server", type=shlex.split, default="", metavar="ARGS", help="Further arguments of both, in one word.")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Keep what vLLM says in this directory.")
@additional_config
@as_json
def bench(
    model: str, tools: tuple[str, ...], tokens: tuple[int, ...], output: int, prompts: int | None, concurrency: int,
    server: list[str], logs: Path | None, additional: dict[str, Any] | None, as_json: bool,
) -> None:  # fmt: skip
    """How fast MODEL is served with S2O, and how fast without, by `vllm bench serve` and `vllm bench throughput`.

    Both get the same random prompts and arguments; without S2O vLLM takes the attention backend that it chooses by
    itself. Prompts of random words attend otherwise than text does: densities, and so speeds, of your own prompts may
    differ. Prefix caching is off, or a warm-up would answer for its prompt.

    \b
    Example, for a machine without a GPU (with one, leave --server out):
      vllm-s2o bench .models/SmolLM2-135M-Instruct --tool serve --tokens 4096 --prompts 1 --server "--enforce-eager --gpu-memory-utilization 0.5"
    """  # noqa: E501
    _check(server, prompts, concurrency)
    # Before any server: vLLM would say the same at the end of a long log.
    known = models.read(model)
    settings.load_with(settings.traits_of(known), settings.part_of(additional))
    lengths = _lengths(tokens, output, _longest(known, server))
    loads = [Load(length, output, concurrency, prompts or max(PROMPTS, concurrency)) for length in lengths]
    runs = [Run(tool, load) for tool in tools or ("serve", "throughput") for load in loads]
    flags = {WITH: ["--attention-backend", "CUSTOM"], WITHOUT: []}
    if additional is not None:
        flags[WITH] += ["--additional-config", json.dumps(additional)]
    arguments = {name: ["--no-enable-prefix-caching", *more, *server] for name, more in flags.items()}
    try:
        found = _compare(model, arguments, runs, logs, quiet=as_json)
    except (BenchError, ServerError) as error:
        raise _failed(error, logs) from error
    if not any(figures[WITH].get("density") is not None for figures in found.values()):
        click.echo("No prompt was long enough for S2O: see min_seq_len in `vllm-s2o config show MODEL`.", err=True)
    if as_json:
        print_json({"environment": describe(), "model": model, "server": server, "runs": _document(found)})
        return
    for run, of in found.items():
        click.echo("\n".join(_table(run, of)))


def _check(server: list[str], prompts: int | None, concurrency: int) -> None:
    """Refuse what would be no comparison, or none of what was asked."""
    if choose_what_is_compared(server):
        raise click.UsageError(
            "--server cannot choose the backend or the additional config, nor name a --config file: both are compared "
            "here."
        )
    if prompts is not None and prompts < concurrency:
        raise click.UsageError(f"--prompts {prompts} is fewer than --concurrency {concurrency}: give as many, or more.")
    advice = checks.without_vllm()
    if advice is not None:
        raise click.ClickException(f"vLLM, whose tools are run, is not installed: {advice}")


def _longest(known: models.Model, server: list[str]) -> int | None:
    """Tokens that a prompt and its answer may have together; None where vLLM alone knows."""
    given = {flag.name: flag.value for flag in flags(server)}
    if "--max-model-len" in given:
        return int(given["--max-model-len"]) if given["--max-model-len"].isdecimal() else None
    text = known.hf_text_config
    rope = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    # A factor may or may not be a part of the length that the file states.
    return None if "--hf-overrides" in given or "factor" in str(rope) else known.max_model_len


def _lengths(tokens: tuple[int, ...], output: int, longest: int | None) -> tuple[int, ...]:
    """Of prompts, so that answers fit behind them."""
    if longest is None:
        return tokens or (TOKENS,)
    most = longest - output
    if most < 1:
        raise click.UsageError(f"--output {output} leaves no room for a prompt: the context ends at {longest} tokens.")
    if tokens and max(tokens) > most:
        raise click.UsageError(
            f"--tokens {max(tokens)} and --output {output} do not fit into the context of {longest} tokens: allowed "
            f"are prompts of up to {most}."
        )
    return tokens or (min(TOKENS, most),)


def _failed(error: Exception, logs: Path | None) -> click.ClickException:
    """The sentence, after what vLLM said at last."""
    sentence, _, said = str(error).partition("\n")
    if not said.strip():
        return click.ClickException(sentence)
    click.echo(said, err=True)
    sentence = sentence.rstrip(":.").removesuffix("; the end of its output")
    more = f"{logs} holds the logs" if logs else "--logs DIR would keep the logs"
    return click.ClickException(f"{sentence}: see the lines above; {more}.")


def _compare(
    model: str, arguments: dict[str, list[str]], runs: list[Run], logs: Path | None, quiet: bool
) -> dict[Run, dict[str, dict[str, Any]]]:
    """Run -> side -> figures, for sides with these arguments of vLLM."""
    found: dict[Run, dict[str, dict[str, Any]]] = {run: {} for run in runs}
    with tempfile.TemporaryDirectory() as scratch:
        where = logs or Path(scratch)
        where.mkdir(parents=True, exist_ok=True)
        with layers_done(len(arguments) * len(runs), quiet=quiet, unit="runs") as progress:
            for name, given in arguments.items():
                try:
                    for run, figures in _measure(model, name, given, runs, where, progress):
                        found[run][name] = figures
                except (BenchError, ServerError) as error:
                    raise type(error)(f"{name}: {error}") from error
    return found


def _measure(
    model: str, name: str, arguments: list[str], runs: list[Run], where: Path, progress: Callable[[str, int], None]
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run's figures with these arguments: those of one server first, then engines of their own."""
    # A user's own server, unlike those of tests: it may download the model, and variables mean what they say.
    own = {"HF_HUB_OFFLINE": "0"} | {key: os.environ[key] for key in (*OURS, "HF_HUB_OFFLINE") if key in os.environ}
    served = [run for run in runs if run.tool == "serve"]
    if served:
        progress(f"{name}: a server starts", 0)
        with Server(
            model, where / f"serve-{name}.log", arguments, own, name="model", start_seconds=START_SECONDS
        ) as server:
            for run in served:
                progress(f"{name}: {run.tool} {run.load.prompt_len}", 0)
                before = len(server.log)
                figures = bench_serve(server, model, run.load, where)
                yield run, _named(figures, server.log, before)
                progress(f"{name}: {run.tool} {run.load.prompt_len}", 1)
    for run in runs:
        if run.tool == "serve":
            continue
        progress(f"{name}: {run.tool} {run.load.prompt_len}", 0)
        log = where / f"{run.tool}-{name}-{run.load.prompt_len}.log"
        asked = at_once(run.load.prompt_len, run.load.output_len, run.load.prompts)
        result = bench_engine(run.tool, model, [*asked, *arguments], log, own)
        figures = {
            "completed": result["num_requests"], "duration": result["elapsed_time"],
            "total_token_throughput": result["tokens_per_second"],
        }  # fmt: skip
        yield run, _named(figures, log.read_text(errors="replace"), 0)
        progress(f"{name}: {run.tool} {run.load.prompt_len}", 1)


def _named(figures: dict[str, Any], log: str, before: int) -> dict[str, Any]:
    visited, causal = pairs(log, before)
    rest = {name: value for name, value in figures.items() if name != "total_token_throughput"}
    density = round(visited / causal, 4) if causal else None
    return {**rest, "tokens_per_s": figures["total_token_throughput"], "density": density}


def _document(found: dict[Run, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    names = {WITH: "s2o", WITHOUT: "dense"}
    return [
        {
            "tool": run.tool, "prompt_len": run.load.prompt_len, "output_len": run.load.output_len,
            "prompts": run.load.prompts, "concurrency": run.load.concurrency if run.tool == "serve" else None,
            **{names[name]: figures for name, figures in of.items()},
        }
        for run, of in found.items()
    ]  # fmt: skip


def _table(run: Run, of: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", run.title, f"{'':36}{WITH:>12}{WITHOUT:>12}{'gain':>9}"]
    for name, (label, form) in FIGURES.items():
        values = [of[side].get(name) for side in (WITH, WITHOUT)]
        if all(value is None for value in values):
            continue
        cells = "".join(f"{'-' if value is None else format(value, form):>12}" for value in values)
        ours, theirs = values
        gain = ""
        if ours and theirs:
            gain = f"{ours / theirs if name in MORE_IS_BETTER else theirs / ours:.2f}x"
        lines.append(f"{label:36}{cells}{gain:>9}")
    return lines
