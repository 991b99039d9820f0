"""`vllm bench throughput`: vLLM's engine without a server, all prompts given at once."""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from latency import OUTPUT_TOKENS
from record import Record
from servers import CPU, PROVIDERS, compiled_while_serving, density, model_and_args, our_lines, room

from vllm_s2o.cli.server import bench_command, environment
from vllm_s2o.stats import prefills

TOOL = "bench throughput"
SECONDS = 580
"""After which a run is given up, its engine's start included."""


def bench(model: str, tokens: int, prompts: int, args: list[str], log: Path) -> dict[str, Any]:
    """Figures of one `vllm bench throughput`, by the names that `vllm bench serve` gives them."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [*bench_command("throughput"), "--model", model, "--dataset-name", "random", "--seed", "1"]
    # --input-len and --output-len would be passed over: these have defaults, which win.
    command += ["--random-input-len", str(tokens), "--random-output-len", str(OUTPUT_TOKENS)]
    command += ["--num-prompts", str(prompts), "--num-warmups", "1", "--output-json", str(result), *args]
    status = run(command, log)
    if status or not result.exists():
        end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        sys.exit(f"serving.py: vllm bench throughput ended with {status}; the end of its output:\n{end}")
    figures, said = json.loads(result.read_text()), log.read_text(errors="replace")
    return {
        "completed": figures["num_requests"],
        "duration": figures["elapsed_time"],
        "total_token_throughput": figures["tokens_per_second"],
        # The warm-up's prompt counts too: it is one of the same length.
        "density": density(prefills(said)),
        "compiled_while_serving": compiled_while_serving(said),
    }


def run(command: list[str], log: Path) -> int | str:
    """The exit status, or why there is none. In a group of its own: whatever ends this program, no engine is left to
    hold the GPU's memory."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(CPU), start_new_session=True
        )
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return f"no result after {SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def throughput(options: argparse.Namespace, record: Record, logs: Path) -> None:
    model, args = model_and_args(options.model, options.shape, options.server, logs)
    for name, asked in itertools.product(options.providers, options.tokens):
        tokens = room(asked, OUTPUT_TOKENS, options.shape)
        log = logs / f"throughput-{name}-{tokens}.log"
        found = bench(model, tokens, options.prompts, [*PROVIDERS[name], *args], log)
        lengths = {"prompt_len": tokens, "output_len": OUTPUT_TOKENS, "concurrency": None}
        record.put(name, {"tool": TOOL, **lengths, "repeats": [found]}, our_lines(log.read_text(errors="replace")))
        print(
            f"{name}: {tokens} tokens in, {OUTPUT_TOKENS} out, {found['completed']} prompts at once: "
            f"{found['total_token_throughput']:.0f} tokens/s, density {found['density']}",
            flush=True,
        )
