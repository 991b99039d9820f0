"""vLLM's own tools, as `benchmarks/serving.py` calls them: their options, their figures, and the density in the log."""

import csv
import json
import os
import shlex
import subprocess
import sys
import time

import psutil
import pytest
from bench_modules import latency, main
from processes import CHANGED, ROOT
from serving import BASE_ARGS, ONE_PROCESS

pytestmark = pytest.mark.serving


@pytest.mark.long
def test_bench_serve(s2o, model, tmp_path):
    figures = latency.bench(s2o, str(model), latency.Load(2100, 4, 1, 1, 0), tmp_path)
    assert (figures["completed"], figures["total_input_tokens"], figures["total_output_tokens"]) == (1, 2100, 4)
    assert 0 < figures["median_tpot_ms"] < figures["median_ttft_ms"]
    assert 0 < figures["density"] < 1


UNI = ["--distributed-executor-backend", "uni"]


@pytest.mark.long
def test_bench_throughput(model, monkeypatch, tmp_path):
    """In the processes that it starts by itself."""
    row = bench("throughput", ["--prompts", "2"], [], model, monkeypatch, tmp_path)
    assert (row["tool"], row["prompts"], row["ttft_ms_p50"]) == ("bench throughput", "2", "")


@pytest.mark.long
def test_bench_latency(model, monkeypatch, tmp_path):
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    row = bench("ttft", ["--repeats", "2"], UNI, model, monkeypatch, tmp_path)
    names = ("tool", "concurrency", "output_len", "prompts", "repeats")
    assert [row[name] for name in names] == ["bench latency", "1", "1", "1", "2"]
    assert float(row["ttft_ms_p50"]) > 0


def bench(what, arguments, more, model, monkeypatch, tmp_path) -> dict[str, str]:
    """The row of one of vLLM's tools that start an engine without a server."""
    config = '{"s2o": {"min_seq_len": 512, "segment_len": 256, "budget": 0.1}}'
    files = ["--out", str(tmp_path / "result.json"), "--table", str(tmp_path / "table.csv")]
    asked = ["--shape", "tiny", "--tokens", "1500", "--providers", "s2o", *arguments]
    args = shlex.join([*BASE_ARGS, *more, "--additional-config", config])
    monkeypatch.setattr(sys, "argv", ["serving.py", what, str(model), *asked, *files, f"--server={args}"])
    main.main()
    (row,) = csv.DictReader((tmp_path / "table.csv").open(newline=""))
    assert (row["model"], row["prompt_len"]) == ("tiny", "1500")
    assert float(row["tokens_per_s"]) > 0
    assert 0 < float(row["density"]) < 1
    (run,) = json.loads((tmp_path / "result.json").read_text())["providers"]["s2o"]["runs"]
    assert run["max_num_batched_tokens"] == 8192  # of BASE_ARGS, by vLLM's own word
    return row


def test_a_benchmark_that_is_told_to_stop_takes_its_server_along(tmp_path):
    """As `timeout` tells it. The server is in a process group of its own."""
    log = tmp_path / "latency-s2o.log"
    files = ["--out", tmp_path / "result.json", "--logs", tmp_path]
    command = [sys.executable, ROOT / "benchmarks" / "serving.py", "latency", "no-model", "--providers", "s2o", *files]
    # Not from the repository's root, whose kernels/ a program without PYTHONSAFEPATH would find.
    env = {name: value for name, value in os.environ.items() if name not in CHANGED}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and psutil.Process(process.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.1)
        servers = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.stderr.read().splitlines()[-1] == (
            "serving.py: told to stop; speeds measured before are written, needles are not."
        )
    assert process.returncode == 1
    assert servers
    assert not psutil.wait_procs(servers, timeout=10)[1]
