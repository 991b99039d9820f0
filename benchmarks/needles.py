"""Numbers hidden in prompts, asked of a served model with S2O and without."""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from servers import FLAG, our_lines, serve

from vllm_s2o.cli.server import Server
from vllm_s2o.quality.needles import Needle, needle
from vllm_s2o.step_log import LOG_INTERVAL, Prefill, prefills

LENGTHS = (1000, 4000, 7800)
LONG = 4000
"""Prompts of this length and above must be sparse."""
DEPTHS = (0.1, 0.5, 0.9)


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
    steps: dict[str, list[Prefill]] = {}
    said: list[str] = []
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
