"""Benchmarks refuse to write a result that shows nothing."""

import contextlib
import csv
import importlib.util
import json
import sys

import pytest
from processes import ROOT

from vllm_s2o.quality.needles import Needle

spec = importlib.util.spec_from_file_location("benchmarks_serving", ROOT / "benchmarks" / "serving.py")
serving = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serving)

NEEDLES = [Needle(f"{length} tokens, depth 50%", str(length), "12345") for length in (1000, 4000, 7800)]


class Server:
    """Answers every prompt; its log shows steps of the given densities, by the prompt's length."""

    def __init__(self, densities: dict[str, list[float]]):
        self.densities = densities
        self.log = ""

    def ask(self, prompt: str) -> str:
        for density in self.densities.get(prompt, []):
            line = f"s2o: prefill query={prompt} seq={prompt} density={density:.3f} sparse_layers=2/3 | total"
            self.log += f"INFO {line}\n"
        return "It is 12345."


@pytest.fixture
def needles(monkeypatch, tmp_path):
    """Run the benchmark; the result, or None where it wrote none."""

    def needles(**densities: list[float]):
        server = Server({name.removeprefix("of_"): steps for name, steps in densities.items()})
        out = tmp_path / "result.json"
        monkeypatch.setattr(serving, "serve", lambda *_: contextlib.nullcontext(server))
        monkeypatch.setattr(serving, "prompts", lambda _: iter(NEEDLES))
        monkeypatch.setattr(serving.time, "sleep", lambda _: None)
        monkeypatch.setattr(sys, "argv", ["serving.py", "needles", "model", "--out", str(out)])
        try:
            serving.main()
        finally:
            assert out.exists() == (sys.exc_info()[0] is None)
        return json.loads(out.read_text())

    return needles


def test_a_result_shows_the_steps_of_each_prompt(needles):
    result = needles(of_4000=[0.5], of_7800=[1.0, 0.3])
    densities = {name: [step["density"] for step in steps] for name, steps in result["prefills"].items()}
    assert list(densities.values()) == [[], [0.5], [1.0, 0.3]]
    assert result["found"] == {"S2O": 3, "dense": 3}
    assert {"commit", "changed"} <= set(result["environment"])


@pytest.mark.parametrize("steps", [[], [1.0, 1.0]], ids=["no step", "dense steps"])
def test_a_long_prompt_that_was_dense_fails(needles, steps):
    with pytest.raises(SystemExit) as caught:
        needles(of_4000=steps, of_7800=[0.3])
    assert caught.value.code == (  # a text: printed, and exit status 1
        "serving.py: no step with a density below 1 for the prompts of 4000 tokens, depth 50%; nothing is written."
    )


def test_latency_writes_a_row_per_run(monkeypatch, tmp_path):
    """A server whose every benchmark logs two chunks of a prompt; the table names what was run."""
    commands = []

    class Benched:
        log, port, name, env = "", 1, "model", {}

    server = Benched()

    really_run = serving.subprocess.run

    def run(command, **options):
        if "bench" not in command:  # git, which names the commit
            return really_run(command, **options)
        commands.append(command)
        at = {name: command[command.index(name) + 1] for name in ("--random-input-len", "--max-concurrency")}
        tokens = int(at["--random-input-len"])
        for begin, share in ((0, 0.4), (tokens // 2, 0.1)):
            line = f"query={tokens // 2} seq={begin + tokens // 2} density={share:.3f} sparse_layers=2/2 | total"
            server.log += f"INFO s2o: prefill {line}\n"
        figures = {"completed": 3, "median_ttft_ms": 12.3, "total_token_throughput": 456.7}
        (tmp_path / "logs" / "bench.json").write_text(json.dumps(figures))
        return serving.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(serving.subprocess, "run", run)
    monkeypatch.setattr(serving, "serve", lambda *_: contextlib.nullcontext(server))
    table = tmp_path / "serving.csv"
    arguments = ["--tokens", "1000", "2000", "--concurrency", "1", "8", "--providers", "s2o", "--prompts", "3"]
    files = ["--out", str(tmp_path / "result.json"), "--logs", str(tmp_path / "logs"), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", ["serving.py", "latency", "model", *arguments, *files])
    serving.main()
    rows = list(csv.DictReader(table.open(newline="")))
    assert [(row["prompt_len"], row["concurrency"]) for row in rows] == [
        ("1000", "1"), ("1000", "8"), ("2000", "1"), ("2000", "8"),
    ]  # fmt: skip
    assert {(row["backend"], row["ttft_ms_p50"], row["tokens_per_s"]) for row in rows} == {("s2o", "12", "457")}
    # Chunks count with their causal pairs: 1 : 3.
    assert {float(row["density"]) for row in rows} == {0.175}
    assert [command[command.index("--num-prompts") + 1] for command in commands] == ["3", "8", "3", "8"]
