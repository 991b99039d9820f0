"""README's first steps: `make serve` with nothing changed, and the request that README sends."""

import json
import re
import subprocess
import sys
import time

import pytest
from serving import CUDA, MADE_HERE, MODEL_NAME, SHARE, MakeServe

from vllm_s2o.step_log import prefills

pytestmark = pytest.mark.serving


def totals(log: str) -> tuple[int, int, float]:
    """Steps, tokens and density of all long prefills so far: lines about single steps may be left out, totals miss
    nothing."""
    lines = re.findall(r"\| total steps=(\d+) tokens=(\d+) density=([0-9.]+)", log)
    steps, tokens, density = lines[-1] if lines else (0, 0, 1)
    return int(steps), int(tokens), float(density)


@pytest.fixture(scope="module")
def server(model, log_dir):
    settings, args = [], []
    if model != MADE_HERE:
        settings, args = [f"MODEL={model}"], ["--served-model-name", MODEL_NAME]
    if CUDA:  # the default share is nearly all, and other tests' servers are up
        args += SHARE
    with MakeServe(log_dir / "make serve.log", *settings, f"ARGS={' '.join(args)}") as server:
        yield server


@pytest.mark.parametrize("asked", [2900, pytest.param(None, marks=pytest.mark.long, id="as README asks")])
def test_the_needle_of_readme(server, model, asked):
    command = [sys.executable, "-P", "-m", "vllm_s2o.quality.needles", str(model), "--name", MODEL_NAME]
    command += ["--tokens", str(asked), "--seed", "2"] if asked else []  # another text: no prefix is shared
    before = totals(server.log)
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    number = re.fullmatch(r"the number is (\d+)", made.stderr.splitlines()[-1])[1]
    answer = server.client.chat.completions.create(**json.loads(made.stdout))
    assert number in answer.choices[0].message.content

    prompt, deadline = answer.usage.prompt_tokens, time.monotonic() + 10
    assert prompt > (asked or 7800) - 100
    while totals(server.log)[1] - before[1] < prompt and time.monotonic() < deadline:
        time.sleep(0.2)  # a line may be held back for a second
    steps, tokens, density = totals(server.log)
    assert tokens - before[1] == prompt, "a part of the prompt ran dense"
    assert 0 < density < (0.8 if asked else 0.5)
    assert CUDA or steps - before[0] == (2 if asked else 4), "vLLM cuts the prompt as README's log shows"
    for step in prefills(server.log):
        assert step.density < 1
        assert step.sparse_layers > step.num_layers / 2
