"""vLLM's own `vllm bench` tools: against a server, or with an engine of their own, and what they measured."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_s2o.cli.server import Server, bench_command, environment
from vllm_s2o.step_log import LOG_INTERVAL

FIGURES = (
    "completed", "failed", "total_input_tokens", "total_output_tokens", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "p99_itl_ms", "duration",
    "total_token_throughput",
)  # fmt: skip
"""Of what `vllm bench serve` writes, those that are kept."""

SERVE_SECONDS = 500
THROUGHPUT_SECONDS = 580
"""After which a run is given up; an engine of the tool's own has to start within them too."""


class BenchError(RuntimeError):
    """Why a run gave no figures, in one sentence or with the end of the tool's output."""


class Load(NamedTuple):
    """What a server is asked, and how many times over."""

    prompt_len: int
    output_len: int
    concurrency: int
    prompts: int
    warmups: int = 1
    repeats: int = 1


def bench_serve(server: Server, model: str, load: Load, directory: Path) -> dict[str, Any]:
    """One `vllm bench serve` with random prompts, the same ones for every server.

    Returns when the server's log has told of all that it did.

    Raises:
        BenchError: it failed, took too long, or not all requests were answered.
    """
    result = directory / "bench.json"
    command = [*bench_command("serve"), "--model", model, "--served-model-name", server.name]
    command += ["--host", "127.0.0.1", "--port", str(server.port), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(load.prompt_len), "--random-output-len", str(load.output_len)]
    command += ["--num-prompts", str(load.prompts), "--max-concurrency", str(load.concurrency), "--seed", "1"]
    command += ["--num-warmups", str(load.warmups), "--save-result", "--result-dir", str(directory)]
    command += ["--result-filename", result.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=server.env, timeout=SERVE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BenchError(
            f"vllm bench serve did not end in {SERVE_SECONDS} s with prompts of {load.prompt_len} tokens."
        ) from error
    if done.returncode:
        raise BenchError(f"vllm bench serve failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    time.sleep(2 * LOG_INTERVAL)  # lines are held back: the last one must not count with the next run
    figures = json.loads(result.read_text())
    if figures["completed"] < load.prompts:
        raise BenchError(
            f"only {figures['completed']} of {load.prompts} requests of {load.prompt_len} tokens were "
            "answered; that run is not written."
        )
    return {name: figures[name] for name in FIGURES if name in figures}


def at_once(prompt_len: int, output_len: int, prompts: int) -> list[str]:
    """Arguments of `vllm bench throughput` for random prompts, all at once."""
    # --input-len and --output-len would be passed over: these have defaults, which win.
    lengths = ["--random-input-len", str(prompt_len), "--random-output-len", str(output_len)]
    asked = ["--num-prompts", str(prompts), "--num-warmups", "1"]
    return ["--dataset-name", "random", "--seed", "1", *lengths, *asked]


def bench_engine(
    tool: str, model: str, arguments: Sequence[str], log: Path, more: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One `vllm bench TOOL` that starts an engine of its own, `throughput` or `latency`: what it wrote.

    Args:
        log: takes the output of the tool and its engine; the result lies beside it.
        more: further variables of its environment.

    Raises:
        BenchError: with the end of the output.
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    command = [*bench_command(tool), "--model", model, *arguments, "--output-json", str(result)]
    status = run_to_end(command, log, environment(more), THROUGHPUT_SECONDS)
    if status or not result.exists():
        end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise BenchError(f"vllm bench {tool} ended with {status}; the end of its output:\n{end}")
    return json.loads(result.read_text())


def run_to_end(command: Sequence[str], log: Path, env: Mapping[str, str], seconds: float) -> int | str:
    """The exit status, or why there is none. In a group of its own: whatever ends this program, no engine is left to
    hold the GPU's memory."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"no result after {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
