"""`vllm bench serve` against servers, one per provider: long prompts, and what stays dense."""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any

from record import Record
from servers import PROVIDERS, compiled_while_serving, density, model_and_args, our_lines, room, serve, step_tokens

from vllm_s2o.cli.server import Server
from vllm_s2o.cli.vllm_bench import BenchError, Load, bench_serve

TOOL = "bench serve"
OUTPUT_TOKENS = 16

# The claim about them is a difference of at most 1 %, hence many short requests and repetitions. Sequences stay shorter
# than the smallest min_seq_len that is shipped, 2,048 tokens.
ALSO = {
    "short": (Load(2000, OUTPUT_TOKENS, 1, 64, 1, 5), Load(2000, OUTPUT_TOKENS, 8, 128, 8, 5)),
    "decode": (Load(1024, 256, 8, 32, 8, 3),),
}
MEMORY = 0.9
"""The share of a GPU's memory that servers get together, about what vLLM takes for one."""
CONTEXT = 8192
"""Tokens, where servers share the memory: a large model's whole context needs more, and short prompts are asked."""


def loads(options: argparse.Namespace) -> list[Load]:
    """Long prompts of each length at each concurrency, in one wave at least, and what --also names."""
    long: list[Load] = []
    for asked, concurrency in itertools.product(options.tokens, options.concurrency):
        tokens = room(asked, OUTPUT_TOKENS, options.shape)
        # A warm-up takes as long as a prompt: one per length.
        warmups = int(all(load.prompt_len != tokens for load in long))
        long.append(Load(tokens, OUTPUT_TOKENS, concurrency, max(options.prompts, concurrency), warmups))
    return [*long, *(load for name in options.also for load in ALSO[name])]


def bench(server: Server, model: str, load: Load, directory: Path) -> dict[str, Any]:
    """Figures of one `vllm bench serve`, and the density of what the server did meanwhile."""
    before = len(server.log)
    try:
        figures = bench_serve(server, model, load, directory)
    except BenchError as error:
        sys.exit(f"serving.py: {error}")
    log = server.log[before:]
    told = {"density": density(server.log, before), "compiled_while_serving": compiled_while_serving(log)}
    return figures | told


def latency(options: argparse.Namespace, record: Record, logs: Path) -> None:
    """Each provider's server after the other's, or all of them at once and each load asked of them in turn: what a
    minute does to the GPU's clock then happens to all alike."""
    model, args = model_and_args(options.model, options.shape, options.server, logs)
    groups = [options.providers] if options.in_turn else [[name] for name in options.providers]
    for names in groups:
        share = shared(len(names), loads(options)) if len(names) > 1 else []
        with contextlib.ExitStack() as stack:
            up = {
                name: stack.enter_context(serve(model, logs / f"latency-{name}.log", [*PROVIDERS[name], *share, *args]))
                for name in names
            }
            for load in loads(options):
                measure(up, model, load, record, logs)


def shared(servers: int, asked: list[Load]) -> list[str]:
    """Arguments of each of several servers on one GPU."""
    longest = max(load.prompt_len + load.output_len for load in asked)
    memory = f"{MEMORY / servers:.2f}"
    return ["--gpu-memory-utilization", memory, "--max-model-len", str(max(longest, CONTEXT))]


def measure(up: dict[str, Server], model: str, load: Load, record: Record, logs: Path) -> None:
    """All repetitions of a load, of each server that is up; the first of one repetition is the last of the next."""
    repeats: dict[str, list[dict[str, Any]]] = {name: [] for name in up}
    for number in range(load.repeats):
        for name in [*up][:: -1 if number % 2 else 1]:
            server = up[name]
            found = bench(server, model, load, logs)
            repeats[name].append(found)
            asked: dict[str, Any] = {"prompt_len": load.prompt_len, "output_len": load.output_len}
            asked |= {"concurrency": load.concurrency, "max_num_batched_tokens": step_tokens(server.log)}
            told = {"tool": TOOL, **asked, "servers": len(up), "repeats": repeats[name]}
            record.put(name, told, our_lines(server.log))
            print(
                f"{name}: {load.prompt_len} tokens in, {load.output_len} out, concurrency {load.concurrency}: "
                f"median TTFT {found['median_ttft_ms']:.1f} ms, TPOT {found['median_tpot_ms']:.3f} ms, "
                f"completed {found['completed']}, density {found['density']}",
                flush=True,
            )
