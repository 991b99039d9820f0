#!/usr/bin/env python3
"""Real servers, asked through the OpenAI API and measured by vLLM's own tools.

    python benchmarks/serving.py needles MODEL --out RESULT.json [--like OTHER.json]
    python benchmarks/serving.py latency MODEL --out RESULT.json [--tokens 32768] [--shape llama-3.1-8b]
    python benchmarks/serving.py ttft MODEL --out RESULT.json --add [--tokens 32768] [--shape llama-3.1-8b]
    python benchmarks/serving.py throughput MODEL --out RESULT.json --add [--tokens 32768] [--shape llama-3.1-8b]

`needles` asks a served model for numbers hidden in prompts of 1K to 7.8K tokens, with and without S2O, and fails where
a long one was not sparse; `--like` compares the answers with those of another machine.

`latency` serves a model with S2O and with FLASH_ATTN, one after the other, and runs `vllm bench serve` with the same
prompts against both: long ones, of each length and at each concurrency, and, named by `--also`, short prompts and long
answers, which S2O leaves to vLLM's own attention. With `--in-turn` both servers are up at once, each in its share of
the GPU's memory, and are asked in turn: so are small differences measured.

A server's clients send text, and to tokenise a long prompt takes about a second for any attention. `ttft` gives token
numbers to an engine without a server instead, one prompt after the other with one token of answer, by `vllm bench
latency`. `throughput` gives long prompts to `vllm bench throughput`, all at once. Both start an engine for each length
and provider.

All three take `--shape`, a large model's dimensions with random weights and only the tokenizer of MODEL, and write
after every run. `--add` lets several commands make one result: it keeps what the file holds, replaces what is measured
again, and refuses a file that was made under other conditions. In the table a density is empty where no prompt was long
enough for S2O, and spreads are the largest difference between repetitions, in percent of their median.

Each run names its commit; where the tree is a copy without its repository, the variable S2O_COMMIT may.
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from latency import ALSO, latency
from needles import needles
from offline import offline
from record import Record
from servers import DEFAULT, PROVIDERS, SHAPES, whole

from vllm_s2o.cli.environment import describe

TOKENS = 32768
STARTS = "Each length and provider is an engine's start of its own, which takes minutes for a large model."


def parser() -> argparse.ArgumentParser:
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("model", help="a model's directory")
    every.add_argument("--out", type=Path, required=True, help="the results file")
    every.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    every.add_argument("--server", type=shlex.split, default=[], metavar="ARGS", help="for every server and engine")
    speed = argparse.ArgumentParser(add_help=False)
    speed.add_argument("--tokens", type=whole, nargs="+", help=f"lengths of long prompts (default: {TOKENS})")
    speed.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    speed.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(DEFAULT))
    speed.add_argument("--add", action="store_true", help="keep what the results file holds of other runs")
    speed.add_argument("--table", type=Path, metavar="CSV", help="also write a row per run there")

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = found.add_subparsers(dest="what", required=True)
    asked = commands.add_parser("needles", parents=[every])
    asked.add_argument("--like", type=Path, help="a results file to compare the answers with")
    asked.add_argument("--backends", nargs="+", choices=["S2O", "dense"], default=["S2O", "dense"])
    asked = commands.add_parser("latency", parents=[every, speed])
    asked.add_argument("--concurrency", type=whole, nargs="+", default=[1], help="long prompts at a time")
    asked.add_argument("--prompts", type=whole, default=5, help="long prompts of a run, at least the concurrency")
    asked.add_argument("--also", nargs="+", choices=ALSO, default=[], help="and these; without --tokens, only these")
    asked.add_argument("--in-turn", action="store_true", help="all servers at once, asked one after the other")
    asked = commands.add_parser("ttft", parents=[every, speed], description=STARTS)
    asked.add_argument("--repeats", type=whole, default=3, help="how often a prompt is measured, after a warm-up")
    asked.set_defaults(also=[])
    asked = commands.add_parser("throughput", parents=[every, speed], description=STARTS)
    asked.add_argument("--prompts", type=whole, default=5, help="prompts of a run")
    asked.set_defaults(also=[])
    return found


def parse() -> argparse.Namespace:
    given = parser()
    options = given.parse_args()
    if options.what == "needles":
        return options
    if options.tokens is None:
        options.tokens = [] if options.also else [TOKENS]
    longest = SHAPES[options.shape]["max_position_embeddings"] if options.shape else None
    if longest and max(options.tokens, default=0) > longest:
        given.error(f"argument --tokens: {options.shape} takes {longest} at most, not {max(options.tokens)}")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        conditions = {"model": Path(options.model).name, "server": options.server}
        if options.what == "needles":
            result = {"environment": describe(), **conditions, **needles(options, logs)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        else:
            conditions |= {"model": options.shape or conditions["model"], "shape": options.shape}
            record = Record(options.out, options.table, conditions, options.add)
            {"latency": latency, "ttft": offline, "throughput": offline}[options.what](options, record, logs)


if __name__ == "__main__":
    # A server would outlive this program, and hold the GPU's memory, if a time limit just ended it.
    said = "serving.py: told to stop; speeds measured before are written, needles are not."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(said))
    main()
