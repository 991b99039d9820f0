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


def run(options: dict, cwd: Path) -> tuple[list, str]:
    """What a program writes of its engine, and its log."""
    asked = {"options": options, "prompts": PROMPTS, "generated": 4}
    environment = without(*CHANGED) | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(PROGRAM.parent),
    }  # fmt: skip
    command = [sys.executable, "-P", PROGRAM, json.dumps(asked), cwd / "found.json"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads((cwd / "found.json").read_text()), done.stdout + done.stderr


def in_this_process(llama, overrides) -> list[list[torch.Tensor]]:
    with engines.engine(llama, {**CONFIG, "threshold": 0.15, "layers": overrides}) as llm:
        outputs = engines.ask(llm, PROMPTS)
    return [[engines.of_prompt(output), engines.of_answer(output)] for output in outputs]


@pytest.fixture(scope="module")
def alone(llama):
    """One process, the same thresholds, which others would not have been."""
    found = in_this_process(llama, OVERRIDES)
    for wrong in ([OVERRIDES[0], OVERRIDES[1] | {"heads": [1]}], [OVERRIDES[0] | {"layers": 0}, OVERRIDES[1]]):
        other = in_this_process(llama, wrong)
        assert (found[0][0] - other[0][0]).abs().max() > 10 * TOLERANCE
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, llama, alone, tmp_path):
    """Thresholds of layers and heads are the model's, whoever computes them; each token is counted once."""
    options = engines.options(llama, {**CONFIG, "threshold": 0.15, "layers": OVERRIDES}, **LAYOUTS[layout])
    (answers, tokens_by_path, visited, causal), log = run(options, tmp_path)
    for ours, theirs in zip(answers, alone, strict=True):
        for mine, one in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(mine), one, atol=TOLERANCE, rtol=0)
    assert 0 < min(step.density for step in prefills(log)) < 0.9
    assert tokens_by_path == {"sparse": 1100, "dense below min_seq_len": 40}
    # Of the first rank's heads, in all layers.
    heads = 2 if layout == "tensor" else 4
    assert causal == (700 * 701 + 400 * 401) // 2 * heads * 3
    assert 0 < visited < 0.9 * causal
