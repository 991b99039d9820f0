"""`vllm bench serve` against servers, one per provider: long prompts, and what stays dense."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from record import Record
from servers import PROVIDERS, compiled_while_serving, density, model_and_args, our_lines, room, serve, step_tokens

from vllm_s2o.cli.server import Server, bench_command
from vllm_s2o.stats import LOG_INTERVAL

TOOL = "bench serve"
FIGURES = (
    "completed", "failed", "total_input_tokens", "total_output_tokens", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "p99_itl_ms", "duration",
    "total_token_throughput",
)  # fmt: skip
OUTPUT_TOKENS = 16
SECONDS = 500
"""After which a run is given up."""


class Load(NamedTuple):
    """What a server is asked, and how many times over."""

    prompt_len: int
    output_len: int
    concurrency: int
    prompts: int
    warmups: int = 1
    repeats: int = 1


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
    result, before = directory / "bench.json", len(server.log)
    command = [*bench_command("serve"), "--model", model, "--served-model-name", server.name]
    command += ["--host", "127.0.0.1", "--port", str(server.port), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(load.prompt_len), "--random-output-len", str(load.output_len)]
    command += ["--num-prompts", str(load.prompts), "--max-concurrency", str(load.concurrency), "--seed", "1"]
    command += ["--num-warmups", str(load.warmups), "--save-result", "--result-dir", str(directory)]
    command += ["--result-filename", result.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=server.env, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        sys.exit(f"serving.py: vllm bench serve did not end in {SECONDS} s with prompts of {load.prompt_len} tokens.")
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    time.sleep(2 * LOG_INTERVAL)  # lines are held back: the last one must not count with the next run
    figures = json.loads(result.read_text())
    if figures["completed"] < load.prompts:
        sys.exit(
            f"serving.py: only {figures['completed']} of {load.prompts} requests of {load.prompt_len} tokens were "
            "answered; that run is not written."
        )
    log = server.log[before:]
    return {
        **{name: figures[name] for name in FIGURES if name in figures},
        "density": density(server.log, before),
        "compiled_while_serving": compiled_while_serving(log),
    }


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
