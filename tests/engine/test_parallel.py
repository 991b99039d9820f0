"""Engines in several processes, which share heads, layers or requests: nothing of the answers changes."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import engines
import pytest
import torch
from engines import CONFIG, TOLERANCE, tokens
from processes import CHANGED, ROOT, without
from prometheus_client.parser import text_string_to_metric_families
from serving import S2O, VllmServe

from vllm_s2o.stats import prefills

PROGRAM = ROOT / "tests" / "helpers" / "engine_program.py"
PROMPTS = [tokens(700, 1), tokens(40, 2), tokens(400, 3)]
# One head keeps all of its pairs, and each layer has a threshold of its own.
OVERRIDES = [{"layers": 1, "threshold": 0.3}, {"layers": 2, "heads": [3], "threshold": 0.0}]
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pipeline": {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        # Without any compilation vLLM's CPU runner makes no room for what one stage hands to the next.
        "enforce_eager": False,
        "compilation_config": {"mode": 1, "backend": "eager"},
    },
}


def run(options: dict, cwd: Path) -> tuple[list[list[torch.Tensor]], str]:
    """What a program writes of its engine, and its log."""
    asked = {"options": options, "prompts": PROMPTS, "generated": 4}
    environment = without(*CHANGED) | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(PROGRAM.parent),
    }  # fmt: skip
    command = [sys.executable, "-P", PROGRAM, json.dumps(asked), cwd / "found.json"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = json.loads((cwd / "found.json").read_text())
    return [[torch.tensor(values) for values in output] for output in found], done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(llama):
    """One process, the same thresholds."""
    with engines.engine(llama, {**CONFIG, "threshold": 0.15, "layers": OVERRIDES}) as llm:
        outputs = engines.ask(llm, PROMPTS)
    return [[engines.of_prompt(output), engines.of_answer(output)] for output in outputs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, llama, alone, tmp_path):
    """Thresholds of layers and heads are the model's, whoever computes them."""
    options = engines.options(llama, {**CONFIG, "threshold": 0.15, "layers": OVERRIDES}, **LAYOUTS[layout])
    got, log = run(options, tmp_path)
    for ours, theirs in zip(got, alone, strict=True):
        for mine, one in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, one, atol=TOLERANCE, rtol=0)
    assert any(step.sparse_layers for step in prefills(log))
    assert 0 < min(step.density for step in prefills(log)) < 0.9


@pytest.mark.serving
def test_data_parallel(llama, tmp_path):
    """Two engines behind one server, whose figures are on one page."""
    config = json.dumps({"s2o": {**CONFIG, "budget": 0.25}})
    args = (*S2O, "--additional-config", config, "--max-model-len", "4096", "--data-parallel-size", "2")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    server = VllmServe(llama, tmp_path / "server.log", args, env)
    server.start_seconds = 300
    with server:
        for prompt in (tokens(700, seed) for seed in range(4)):
            server.client.completions.create(model=server.name, prompt=prompt, max_tokens=2)
        expected = {"vllm_s2o_prefill_tokens_total": {"": 2800}, "vllm:request_success_total": {"0": 2, "1": 2}}
        labels = {"vllm_s2o_prefill_tokens_total": "reason", "vllm:request_success_total": "engine"}
        deadline = time.monotonic() + 30
        while (found := counted(server.port, labels)) != expected and time.monotonic() < deadline:
            time.sleep(0.5)
    assert found == expected
    assert len({step.density for step in prefills(server.log)}) == 1


def counted(port: int, labels: dict[str, str]) -> dict[str, dict[str, int]]:
    """Counters on a server's page that are not 0, by one of their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, dict[str, int]] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in labels and sample.value:
            found.setdefault(sample.name, {})[sample.labels[labels[sample.name]]] = int(sample.value)
    return found
