"""Benchmarks of whole servers refuse to write a result that shows nothing, or a mixture."""

import contextlib
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_modules import latency, main, needles, record, servers
from processes import ROOT, without

from vllm_s2o.cli import vllm_bench
from vllm_s2o.config import ModelTraits, load_config
from vllm_s2o.quality.needles import Needle

NEEDLES = [Needle(f"{length} tokens, depth 50%", str(length), "12345") for length in (1000, 4000, 7800)]
CHUNKS = "INFO Chunked prefill is enabled with max_num_batched_tokens=8192.\n"
ENVIRONMENT = {"machine": "GPU", "date": "2026-01-01", "commit": "abc", "changed": False, "vllm": "0.32.0"}


COMMANDS = re.findall(
    r"^    python (benchmarks/\S+) (.+?)(?: {2,}#.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(("program", "line"), COMMANDS)
def test_commands_of_the_readme_are_understood(program, line, tmp_path):
    words = [word.replace("PATH", str(tmp_path)).replace("FILE", str(tmp_path / "out")) for word in shlex.split(line)]
    if program == "benchmarks/serving.py":
        assert main.parser().parse_args(words).model == "MODEL"
        return
    assert program == "benchmarks/attention.py"
    if torch.cuda.is_available():
        pytest.skip("would measure")
    # All is looked at before the GPU is.
    environment = without("PYTHONSAFEPATH")  # which `make test` sets, and which hides what stands beside a script
    done = subprocess.run([sys.executable, ROOT / program, *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "attention.py needs a CUDA device.\n")


def test_the_readme_has_such_commands():
    assert {program for program, _ in COMMANDS} == {"benchmarks/attention.py", "benchmarks/serving.py"}


class Server:
    """Answers every prompt; its log shows steps of the given densities, by the prompt's length."""

    def __init__(self, densities: dict[str, list[float]]):
        self.densities = densities
        self.log = ""

    def ask(self, prompt: str) -> str:
        for density in self.densities.get(prompt, []):
            line = f"s2o: prefill query={prompt} seq={prompt} density={density:.3f} sparse_layers=2/3"
            self.log += f"INFO {line} | total pairs=1/2 process=7\n"
        return "It is 12345."


@pytest.fixture
def run_needles(monkeypatch, tmp_path):
    """Run the benchmark; the result, or None where it wrote none."""

    def run_needles(**densities: list[float]):
        server = Server({name.removeprefix("of_"): steps for name, steps in densities.items()})
        out = tmp_path / "result.json"
        monkeypatch.setattr(needles, "serve", lambda *_: contextlib.nullcontext(server))
        monkeypatch.setattr(needles, "prompts", lambda _: iter(NEEDLES))
        monkeypatch.setattr(needles.time, "sleep", lambda _: None)
        monkeypatch.setattr(sys, "argv", ["serving.py", "needles", "model", "--out", str(out)])
        try:
            main.main()
        finally:
            assert out.exists() == (sys.exc_info()[0] is None)
        return json.loads(out.read_text())

    return run_needles


def test_a_result_shows_the_steps_of_each_prompt(run_needles):
    result = run_needles(of_4000=[0.5], of_7800=[1.0, 0.3])
    densities = {name: [step["density"] for step in steps] for name, steps in result["prefills"].items()}
    assert list(densities.values()) == [[], [0.5], [1.0, 0.3]]
    assert result["found"] == {"S2O": 3, "dense": 3}
    assert {"commit", "changed"} <= set(result["environment"])


@pytest.mark.parametrize("steps", [[], [1.0, 1.0]], ids=["no step", "dense steps"])
def test_a_long_prompt_that_was_dense_fails(run_needles, steps):
    with pytest.raises(SystemExit) as caught:
        run_needles(of_4000=steps, of_7800=[0.3])
    assert caught.value.code == (  # a text: printed, and exit status 1
        "serving.py: no step with a density below 1 for the prompts of 4000 tokens, depth 50%; nothing is written."
    )


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


class Bench:
    """The speed benchmarks with vLLM's tools replaced: each logs two chunks of a long prompt, and has figures."""

    def __init__(self, monkeypatch, directory: Path):
        self.patch = monkeypatch
        self.directory, self.out, self.table = directory, directory / "result.json", directory / "table.csv"
        self.environment = dict(ENVIRONMENT)
        self.commands: list[list[str]] = []
        self.servers = self.at_once = self.most_at_once = 0
        self.served: list[list[str]] = []
        self.ttfts: list[float] = []
        """Medians to come; 12.34 afterwards."""
        self.latencies = [2.0]
        """Seconds that `vllm bench latency` measures."""
        self.status: dict[str, int] = {}
        """Of the tools without a server, by the attention backend."""
        self.unanswered = 0
        monkeypatch.setattr(record, "describe", lambda: dict(self.environment))
        monkeypatch.setattr(latency, "serve", self.serve)
        tools = SimpleNamespace(run=self.bench_serve, TimeoutExpired=subprocess.TimeoutExpired)
        monkeypatch.setattr(vllm_bench, "subprocess", tools)
        monkeypatch.setattr(vllm_bench, "LOG_INTERVAL", 0)
        monkeypatch.setattr(vllm_bench, "run_to_end", self.bench_offline)

    log, port, name, env = CHUNKS, 1, "model", {}  # of the server
    visited = causal = 0

    @contextlib.contextmanager
    def serve(self, model, log, args):
        self.servers += 1
        self.served.append(args)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        yield self
        self.at_once -= 1

    def steps(self, tokens: int) -> str:
        """Of one prompt, where it is long."""
        if tokens <= 2048:
            return ""
        # Two chunks, of which only the second has a line: its totals hold both.
        self.visited += tokens**2 // 8 * 4 // 10 + tokens**2 * 3 // 8 // 10
        self.causal += tokens**2 // 2
        return (
            f"INFO s2o: prefill query={tokens // 2} seq={tokens} density=0.100 sparse_layers=2/2 | total steps=9 "
            f"tokens=9 density=0.999 pairs={self.visited}/{self.causal} process=7\n"
        )

    def bench_serve(self, command, **_):
        self.commands.append(command)
        self.log += self.steps(int(option(command, "--random-input-len")))
        asked = int(option(command, "--num-prompts"))
        figures = {"completed": asked - self.unanswered, "median_ttft_ms": self.ttfts.pop(0) if self.ttfts else 12.34}
        figures |= {"median_tpot_ms": 7.8912, "total_token_throughput": 456.78}
        (Path(option(command, "--result-dir")) / option(command, "--result-filename")).write_text(json.dumps(figures))
        return subprocess.CompletedProcess(command, 0, "", "")

    def bench_offline(self, command, log, env, seconds):
        self.commands.append(command)
        if status := self.status.get(option(command, "--attention-backend"), 0):
            log.write_text("".join(f"line {number}\n" for number in range(1, 51)))
            return status
        if "--num-iters" in command:
            tokens, figures = option(command, "--input-len"), {"avg_latency": 9.9, "latencies": self.latencies}
        else:
            tokens, asked = option(command, "--random-input-len"), int(option(command, "--num-prompts"))
            figures = {"num_requests": asked, "elapsed_time": 2.0, "tokens_per_second": 9.5}
        self.visited = self.causal = 0  # a process of its own
        log.write_text(CHUNKS + self.steps(int(tokens)))
        Path(option(command, "--output-json")).write_text(json.dumps(figures))
        return 0

    def run(self, what: str, arguments: str) -> list[dict[str, str]]:
        """The table's rows."""
        files = ["--out", str(self.out), "--table", str(self.table), "--logs", str(self.directory / "logs")]
        self.patch.setattr(sys, "argv", ["serving.py", what, "model", *shlex.split(arguments), *files])
        main.main()
        return self.rows()

    def tokenizer(self) -> None:
        """Give MODEL what --shape takes of it."""
        self.patch.chdir(self.directory)
        model = self.directory / "model"
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_text("{}")

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.table.open(newline="")))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    return Bench(monkeypatch, tmp_path)


def columns(rows: list[dict[str, str]], *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def test_latency_writes_a_row_per_run(bench):
    rows = bench.run("latency", "--tokens 3000 4000 --concurrency 1 8 --providers s2o --prompts 3")
    assert columns(rows, "prompt_len", "concurrency", "prompts") == [
        ("3000", "1", "3"), ("3000", "8", "8"), ("4000", "1", "3"), ("4000", "8", "8"),
    ]  # fmt: skip
    # Chunks count with their causal pairs: 1 : 3.
    same = {
        "gpu": "GPU", "vllm": "0.32.0", "date": "2026-01-01", "commit": "abc", "model": "model", "backend": "s2o",
        "tool": "bench serve", "output_len": "16", "repeats": "1", "ttft_ms_p50": "12.3", "tpot_ms_p50": "7.891",
        "tokens_per_s": "456.8", "ttft_spread_pct": "", "tpot_spread_pct": "", "density": "0.175",
    }  # fmt: skip
    assert [row.items() & same.items() for row in rows] == [same.items()] * 4
    assert [option(command, "--num-warmups") for command in bench.commands] == ["1", "0", "1", "0"]


def test_what_stays_dense_is_repeated(bench):
    """Short prompts and decode alone, where no length is given; a row holds the median, and how far repetitions lie
    apart."""
    bench.ttfts = [50.0, 52.0, 51.0, 50.5, 51.5]
    rows = bench.run("latency", "--also short decode --providers flash_attn")
    names = ("prompt_len", "output_len", "concurrency", "servers", "prompts", "repeats", "density")
    assert columns(rows, *names) == [
        ("1024", "256", "8", "1", "32", "3", ""), ("2000", "16", "1", "1", "64", "5", ""),
        ("2000", "16", "8", "1", "128", "5", ""),
    ]  # fmt: skip
    assert columns(rows, "ttft_ms_p50", "ttft_spread_pct") == [("12.3", "0.00"), ("51.0", "3.92"), ("12.3", "0.00")]
    asked = [[option(command, name) for name in ("--random-output-len", "--num-warmups")] for command in bench.commands]
    assert asked == [["16", "1"]] * 5 + [["16", "8"]] * 5 + [["256", "8"]] * 3
    assert "--gpu-memory-utilization" not in bench.served[0]


def test_servers_are_asked_in_turn(bench):
    """Both are up at once, each with half of the memory; which of them is first changes with each repetition."""
    bench.ttfts = [1.0, 2.0, 2.0, 1.0, 1.0, 2.0]
    rows = bench.run("latency", "--also decode --in-turn --providers s2o flash_attn --server=--max-model-len=4096")
    assert columns(rows, "backend", "servers", "repeats", "ttft_ms_p50") == [
        ("flash_attn", "2", "3", "2.0"), ("s2o", "2", "3", "1.0"),
    ]  # fmt: skip
    assert bench.most_at_once == 2
    assert [option(args, "--gpu-memory-utilization") for args in bench.served] == ["0.45", "0.45"]
    assert [option(args, "--max-model-len") for args in bench.served] == ["8192", "8192"]
    assert [args[-1] for args in bench.served] == ["--max-model-len=4096"] * 2, "what is given comes last, and wins"


def test_throughput_gives_all_prompts_at_once(bench):
    rows = bench.run("throughput", "--tokens 3000 --prompts 7 --providers s2o_budget_10 flash_attn")
    names = ("backend", "tool", "prompt_len", "output_len", "concurrency", "prompts", "ttft_ms_p50", "tokens_per_s")
    same = ("bench throughput", "3000", "16", "", "7", "", "9.5")
    assert columns(rows, *names) == [("flash_attn", *same), ("s2o_budget_10", *same)]
    assert [option(command, "--attention-backend") for command in bench.commands] == ["CUSTOM", "FLASH_ATTN"]
    assert not bench.servers


def test_ttft_takes_every_iteration_for_a_repetition(bench):
    """The time to the first token is all that an answer of one token takes."""
    bench.latencies = [2.0, 2.5, 1.6]
    rows = bench.run("ttft", "--tokens 3000 4000 --providers s2o_budget_10 flash_attn --repeats 3")
    same = {
        "tool": "bench latency", "output_len": "1", "concurrency": "1", "prompts": "1", "repeats": "3",
        "ttft_ms_p50": "2000.0", "ttft_spread_pct": "45.00", "tpot_ms_p50": "", "tpot_spread_pct": "",
    }  # fmt: skip
    assert [row.items() & same.items() for row in rows] == [same.items()] * 4
    # 1,200 to 1,875 tokens a second at 3,000 tokens.
    assert columns(rows, "prompt_len", "backend", "tokens_per_s", "tokens_per_s_spread_pct", "density") == [
        ("3000", "flash_attn", "1500.0", "45.00", "0.175"), ("3000", "s2o_budget_10", "1500.0", "45.00", "0.175"),
        ("4000", "flash_attn", "2000.0", "45.00", "0.175"), ("4000", "s2o_budget_10", "2000.0", "45.00", "0.175"),
    ]  # fmt: skip
    names = ("--input-len", "--attention-backend")
    assert [tuple(option(command, name) for name in names) for command in bench.commands] == [
        ("3000", "CUSTOM"), ("3000", "FLASH_ATTN"), ("4000", "CUSTOM"), ("4000", "FLASH_ATTN"),
    ], "cut off, it leaves pairs"  # fmt: skip
    asked = ("--output-len", "--batch-size", "--num-iters-warmup", "--num-iters")
    assert [[option(command, name) for name in asked] for command in bench.commands] == [["1", "1", "1", "3"]] * 4
    assert {"--disable-detokenize", "--no-enable-prefix-caching"} <= set(bench.commands[0])
    assert not bench.servers


def test_ttft_leaves_room_for_its_one_token(bench):
    bench.tokenizer()
    rows = bench.run("ttft", "--shape llama-3.1-8b --tokens 32768 131072 --providers flash_attn")
    assert columns(rows, "model", "prompt_len") == [("llama-3.1-8b", "32768"), ("llama-3.1-8b", "131071")]
    assert option(bench.commands[1], "--input-len") == "131071"


@pytest.mark.parametrize("what", ["latency", "ttft", "throughput"])
@pytest.mark.parametrize("log, tokens", [(CHUNKS, 8192), ("INFO nothing of it\n", None)], ids=["said", "not said"])
def test_the_file_holds_the_size_of_chunks(bench, monkeypatch, what, log, tokens):
    monkeypatch.setattr(sys.modules[__name__], "CHUNKS", log)
    bench.log = log
    bench.run(what, "--providers s2o")
    (run,) = json.loads(bench.out.read_text())["providers"]["s2o"]["runs"]
    assert run["max_num_batched_tokens"] == tokens


@pytest.mark.parametrize("what, tool", [("ttft", "latency"), ("throughput", "throughput")])
def test_a_tool_that_fails_shows_the_end_of_its_output(bench, what, tool):
    """What was measured before stays."""
    bench.status = {"FLASH_ATTN": 3}
    with pytest.raises(SystemExit) as caught:
        bench.run(what, "--providers s2o flash_attn")
    said, *end = caught.value.code.splitlines()
    assert said == f"serving.py: vllm bench {tool} ended with 3; the end of its output:"
    assert end == [f"line {number}" for number in range(11, 51)]
    assert columns(bench.rows(), "backend", "tool") == [("s2o", f"bench {tool}")]


def test_a_tenth_is_every_layers():
    """One dense layer among 32 would cost what ten of the others do."""
    shape = servers.SHAPES["llama-3.1-8b"]
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    traits = ModelTraits("llama-3.1-8b", *shape["architectures"], *(shape[name] for name in names))
    given = json.loads(option(servers.PROVIDERS["s2o_budget_10"], "--additional-config"))["s2o"]
    config = load_config(traits, given)
    assert config.source == "llama-3.1-8b-instruct.yaml"
    assert [layer and layer.budget for layer in map(config.layer, range(32))] == [0.1] * 32


def test_commands_add_up(bench):
    """Also over days: each row has its own."""
    bench.run("latency", "--tokens 3000 --concurrency 1 8 --providers s2o")
    bench.environment["date"] = "2026-01-02"
    bench.run("latency", "--tokens 4000 --providers s2o --add")
    bench.run("throughput", "--tokens 3000 --providers s2o --add")
    bench.run("ttft", "--tokens 3000 --providers s2o --add")
    bench.latencies = [1.0]
    bench.run("ttft", "--tokens 3000 --providers s2o --add")
    bench.ttfts = [99.0]
    rows = bench.run("latency", "--tokens 3000 --concurrency 8 --providers s2o flash_attn --add")
    assert columns(rows, "tool", "prompt_len", "concurrency", "backend", "date", "ttft_ms_p50") == [
        ("bench latency", "3000", "1", "s2o", "2026-01-02", "1000.0"),
        ("bench serve", "3000", "1", "s2o", "2026-01-01", "12.3"),
        ("bench serve", "3000", "8", "flash_attn", "2026-01-02", "12.3"),
        ("bench serve", "3000", "8", "s2o", "2026-01-02", "99.0"),
        ("bench serve", "4000", "1", "s2o", "2026-01-02", "12.3"),
        ("bench throughput", "3000", "", "s2o", "2026-01-02", ""),
    ]
    assert len(bench.run("latency", "--tokens 3000 --providers s2o")) == 1, "without --add the file is replaced"


@pytest.mark.parametrize(
    "name, value, arguments",
    [
        ("machine", "another GPU", ""),
        ("vllm", "0.25.1", ""),
        ("server", ["--enforce-eager"], "--server=--enforce-eager"),
    ],
)
def test_a_mixture_is_refused(bench, name, value, arguments):
    before = bench.run("latency", "--providers s2o")
    held = bench.out.read_text()
    if name in bench.environment:
        bench.environment[name] = value
    with pytest.raises(SystemExit) as caught:
        bench.run("latency", f"--providers flash_attn --add {arguments}")
    was = ENVIRONMENT.get(name, [])
    assert caught.value.code == (
        f"serving.py: {bench.out} was made under other conditions ({name} {was}, here {value}): name another file, or "
        "leave out --add to replace it."
    )
    assert (bench.servers, bench.out.read_text(), bench.rows()) == (1, held, before)


def test_another_shape_is_refused(bench):
    bench.tokenizer()
    rows = bench.run("latency", "--shape llama-3.1-8b --tokens 131072 --providers s2o")
    assert columns(rows, "model", "prompt_len") == [("llama-3.1-8b", "131056")], "the answer must fit in as well"
    with pytest.raises(SystemExit, match=r"\(model llama-3.1-8b, here model; shape llama-3.1-8b, here None\)"):
        bench.run("throughput", "--add")
    assert bench.rows() == rows


@pytest.mark.parametrize(
    "held",
    ["", "[]", '{"providers": {}}', '{"environment": {}, "providers": {"s2o": {"completed": 4}}}', '{"found": {}}'],
    ids=["nothing", "a list", "no environment", "an older layout", "needles"],
)
def test_a_file_of_another_kind_is_not_added_to(bench, held):
    bench.out.write_text(held)
    with pytest.raises(SystemExit) as caught:
        bench.run("throughput", "--add")
    assert caught.value.code == (
        f"serving.py: {bench.out} cannot be added to, for it holds no results of latency, ttft or throughput."
    )
    assert (bench.commands, bench.out.read_text()) == ([], held)


def test_each_run_names_its_commit(bench):
    """Results add up over days, and the code goes on meanwhile; changed code is told beside the commit."""
    bench.run("latency", "--providers s2o")
    bench.environment |= {"commit": "def", "changed": True}
    rows = bench.run("latency", "--providers flash_attn --add")
    assert columns(rows, "backend", "commit") == [("flash_attn", "def+changes"), ("s2o", "abc")]


def test_an_interrupted_command_keeps_what_it_measured(bench):
    """The second repetition of the first run does not end."""

    def interrupted(command, **options):
        if len(bench.commands) == 2:
            raise KeyboardInterrupt
        return bench.bench_serve(command, **options)

    bench.run("latency", "--providers flash_attn")
    bench.patch.setattr(vllm_bench.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run("latency", "--also short --providers s2o --add")
    assert columns(bench.rows(), "backend", "prompt_len", "repeats") == [
        ("s2o", "2000", "1"), ("flash_attn", "32768", "1"),
    ]  # fmt: skip
    assert [*json.loads(bench.out.read_text())["providers"]] == ["flash_attn", "s2o"]


def test_a_run_that_does_not_end_is_given_up(bench):
    def endless(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    bench.patch.setattr(vllm_bench.subprocess, "run", endless)
    with pytest.raises(SystemExit) as caught:
        bench.run("latency", "--providers s2o")
    assert caught.value.code == "serving.py: vllm bench serve did not end in 500 s with prompts of 32768 tokens."


def test_requests_without_an_answer_are_no_result(bench):
    bench.unanswered = 2
    with pytest.raises(SystemExit) as caught:
        bench.run("latency", "--providers s2o --prompts 5")
    assert caught.value.code == (
        "serving.py: only 3 of 5 requests of 32768 tokens were answered; that run is not written."
    )
    assert not bench.out.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("latency --tokens 0", "argument --tokens: '0' is not a whole number above 0"),
        ("latency --prompts few", "argument --prompts: 'few' is not a whole number above 0"),
        ("ttft --repeats 0", "argument --repeats: '0' is not a whole number above 0"),
        ("throughput --shape llama-3.1-8b --tokens 200000", "llama-3.1-8b takes 131072 at most, not 200000"),
        ("throughput --also decode", "unrecognized arguments: --also decode"),
        ("needles --add", "unrecognized arguments: --add"),
    ],
)
def test_bad_arguments(bench, capsys, arguments, said):
    what, *more = arguments.split()
    with pytest.raises(SystemExit) as caught:
        bench.run(what, shlex.join(more))
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_shape_needs_a_tokenizer(bench):
    with pytest.raises(SystemExit) as caught:
        bench.run("latency", "--shape llama-3.1-8b")
    assert caught.value.code == "serving.py: --shape takes the tokenizer of MODEL, which has no model/tokenizer.json."


def test_a_run_that_is_given_up_leaves_no_process(tmp_path):
    """vLLM's engine is a process of its own, and would keep the GPU's memory."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log"
    assert vllm_bench.run_to_end([sys.executable, "-c", parent], log, os.environ, 5) == "no result after 5 s"
    # One that has ended, and that nothing has waited for yet, has an empty command line.
    left = Path(f"/proc/{int(log.read_text())}/cmdline")
    deadline = time.monotonic() + 10
    while (alive := left.exists() and left.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


def test_make_bench_measures_both_backends_by_every_tool(bench):
    """What the Makefile asks for is understood, and makes one table."""
    told = subprocess.run(["make", "-n", "GPU=yes", "bench-serving"], cwd=ROOT, capture_output=True, text=True)
    commands = [shlex.split(line) for line in told.stdout.splitlines() if "benchmarks/serving.py" in line]
    assert [command[2] for command in commands] == ["latency", "latency", "ttft", "throughput"]
    assert ["--add" in command for command in commands] == [False, True, True, True]
    files = [[option(command, name) for name in ("--out", "--table", "--shape")] for command in commands]
    assert all(given == files[0] for given in files)
    asked = []
    for command in commands:
        bench.patch.setattr(sys, "argv", command[1:])
        options = main.parse()
        assert options.providers == ["s2o_budget_10", "flash_attn"]
        assert options.tokens == ([] if getattr(options, "in_turn", False) else [32768, 131072])
        asked.append((options.what, options.also, getattr(options, "concurrency", None)))
    assert asked[:2] == [("latency", [], [1, 8]), ("latency", ["short", "decode"], [1])]
