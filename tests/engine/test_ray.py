"""The engine's worker as an actor of Ray, which loads the plugin as every process of vLLM does.

vLLM has Ray for GPUs alone, and vllm-s2o does not need it: `pip install ray`, or these tests are left out.
"""

import importlib.util

import engines
import pytest
from engine_processes import run
from engines import EXACT, agree, tokens

from vllm_s2o.step_log import prefills

PROMPTS = [tokens(700, 1), tokens(40, 2), tokens(400, 3), tokens(600, 4)]
DENSE = 3
"""Which of them asks for dense attention."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(engines.CPU, reason="vLLM has no Ray on a CPU"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]


def test_answers_are_those_of_one_process(llama, tmp_path):
    with engines.engine(llama, EXACT) as llm:
        alone = list(map(engines.said, engines.ask(llm, PROMPTS)))
    options = engines.options(llama, EXACT, distributed_executor_backend="ray")
    (answers, tokens_by_path, visited, causal), log = run(options, PROMPTS, tmp_path, dense=(DENSE,))
    agree([engines.Said(*answer) for answer in answers], alone)
    assert [step.density for step in prefills(log)] == [1.0] * len(prefills(log)) != []
    # A request's wish comes along with it: the steps of an engine are seen.
    assert tokens_by_path == {"sparse": 1100, "dense below min_seq_len": 40, "dense asked by the request": 600}
    assert visited == causal == (700 * 701 + 400 * 401) // 2 * 4 * 3
    assert "s2o: no switch" not in log
