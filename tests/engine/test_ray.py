"""The engine's worker as an actor of Ray, which loads the plugin as every process of vLLM does.

vLLM has Ray for GPUs alone, and vllm-s2o does not need it: `pip install ray`, or these tests are left out.
"""

import importlib.util

import engines
import pytest
from engine_processes import run
from engines import EXACT, agree, tokens

from vllm_s2o.step_log import prefills

PROMPTS = [tokens(700, 1), tokens(40, 2), tokens(400, 3)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(engines.CPU, reason="vLLM has no Ray on a CPU"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]


def test_answers_are_those_of_one_process(llama, tmp_path):
    with engines.engine(llama, EXACT) as llm:
        alone = list(map(engines.said, engines.ask(llm, PROMPTS)))
    options = engines.options(llama, EXACT, distributed_executor_backend="ray")
    (answers, tokens_by_path, visited, causal), log = run(options, PROMPTS, tmp_path)
    agree([engines.Said(*answer) for answer in answers], alone)
    assert [step.density for step in prefills(log)] == [1.0] * len(prefills(log)) != []
    assert "figures without requests: under Ray the steps of an engine are not seen" in log
    print(tokens_by_path, visited, causal)
