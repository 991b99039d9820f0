"""vLLM's engine without a server, by `vllm bench throughput` and `vllm bench latency`. Both know one length: each
length and provider is an engine's start of its own."""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from latency import OUTPUT_TOKENS
from record import Record
from servers import CPU, PROVIDERS, compiled_while_serving, density, model_and_args, our_lines, room, step_tokens

from vllm_s2o.cli.vllm_bench import BenchError, at_once, bench_engine


class Tool(NamedTuple):
    """What is asked of one of vLLM's tools, and what it answers."""

    name: str
    output_len: int
    concurrency: int | None
    arguments: Callable[[argparse.Namespace, int], list[str]]
    figures: Callable[[dict[str, Any], int], list[dict[str, Any]]]
    """One per repetition, by the names that `vllm bench serve` gives them. Both get the prompts' length."""


def _at_once(options: argparse.Namespace, tokens: int) -> list[str]:
    return at_once(tokens, OUTPUT_TOKENS, options.prompts)


def _at_once_figures(result: dict[str, Any], _: int) -> list[dict[str, Any]]:
    return [
        {
            "completed": result["num_requests"],
            "duration": result["elapsed_time"],
            "total_token_throughput": result["tokens_per_second"],
        }
    ]


def _one_prompt(options: argparse.Namespace, tokens: int) -> list[str]:
    lengths = ["--input-len", str(tokens), "--output-len", "1", "--batch-size", "1", "--disable-detokenize"]
    return [*lengths, "--num-iters-warmup", "1", "--num-iters", str(options.repeats)]


def _one_prompt_figures(result: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """The first token is the whole answer."""
    return [
        {
            "completed": 1,
            "duration": seconds,
            "median_ttft_ms": 1000 * seconds,
            "total_token_throughput": tokens / seconds,
        }
        for seconds in result["latencies"]
    ]


TOOLS = {
    "throughput": Tool("throughput", OUTPUT_TOKENS, None, _at_once, _at_once_figures),
    "ttft": Tool("latency", 1, 1, _one_prompt, _one_prompt_figures),
}


def bench(tool: Tool, options: argparse.Namespace, model: str, tokens: int, args: list[str], log: Path) -> list[dict]:
    """Figures of one run, and what the engine's log says of all of it."""
    try:
        result = bench_engine(tool.name, model, [*tool.arguments(options, tokens), *args], log, CPU)
    except BenchError as error:
        sys.exit(f"serving.py: {error}")
    said = log.read_text(errors="replace")
    # The warm-up's prompt counts too: it is one of the same length.
    told = {"density": density(said), "compiled_while_serving": compiled_while_serving(said)}
    return [{**figures, **told} for figures in tool.figures(result, tokens)]


def offline(options: argparse.Namespace, record: Record, logs: Path) -> None:
    tool = TOOLS[options.what]
    model, args = model_and_args(options.model, options.shape, options.server, logs)
    # Providers side by side: a command that is cut off leaves whole comparisons.
    for asked, name in itertools.product(options.tokens, options.providers):
        tokens = room(asked, tool.output_len, options.shape)
        log = logs / f"{options.what}-{name}-{tokens}.log"
        repeats = bench(tool, options, model, tokens, [*PROVIDERS[name], *args], log)
        said = log.read_text(errors="replace")
        lengths: dict[str, Any] = {"prompt_len": tokens, "output_len": tool.output_len}
        lengths |= {"concurrency": tool.concurrency, "max_num_batched_tokens": step_tokens(said)}
        record.put(name, {"tool": f"bench {tool.name}", **lengths, "repeats": repeats}, our_lines(said))
        print(f"{name}: {tokens} tokens in, {tool.output_len} out: {_summary(repeats)}", flush=True)


def _summary(repeats: list[dict[str, Any]]) -> str:
    def median(name: str) -> float:
        return statistics.median(figures[name] for figures in repeats)

    ttft = f"median TTFT {median('median_ttft_ms'):.1f} ms, " if "median_ttft_ms" in repeats[0] else ""
    completed = sum(figures["completed"] for figures in repeats)
    speed = f"{median('total_token_throughput'):.0f} tokens/s"
    return f"{ttft}{speed}, completed {completed}, density {repeats[0]['density']}"
