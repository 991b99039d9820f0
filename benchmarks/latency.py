"""`vllm bench serve` against servers, one per provider: long prompts, and what stays dense."""

import argparse
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
    "short": (Load(2000, OUTPUT_TOKENS, 1, 32, 1, 3), Load(2000, OUTPUT_TOKENS, 8, 64, 8, 3)),
    "decode": (Load(1024, 256, 8, 32, 8, 3),),
}


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
    model, args = model_and_args(options.model, options.shape, options.server, logs)
    for name in options.providers:
        with serve(model, logs / f"latency-{name}.log", [*PROVIDERS[name], *args]) as server:
            for load in loads(options):
                repeats: list[dict[str, Any]] = []
                for _ in range(load.repeats):
                    found = bench(server, model, load, logs)
                    repeats.append(found)
                    asked: dict[str, Any] = {"prompt_len": load.prompt_len, "output_len": load.output_len}
                    asked |= {"concurrency": load.concurrency, "max_num_batched_tokens": step_tokens(server.log)}
                    record.put(name, {"tool": TOOL, **asked, "repeats": repeats}, our_lines(server.log))
                    print(
                        f"{name}: {load.prompt_len} tokens in, {load.output_len} out, concurrency {load.concurrency}: "
                        f"median TTFT {found['median_ttft_ms']:.1f} ms, TPOT {found['median_tpot_ms']:.3f} ms, "
                        f"completed {found['completed']}, density {found['density']}",
                        flush=True,
                    )
