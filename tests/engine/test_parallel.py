"""Engines in several processes, which share heads or layers: nothing of the answers changes.

Engines that share requests are in tests/serving/test_metrics.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import engines
import pytest
import torch
from engines import CONFIG, TOLERANCE, tokens
from processes import CHANGED, ROOT, without

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
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(PROGRAM.parent),
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
