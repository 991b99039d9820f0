"""vLLM's default modes: models compiled, steps replayed from graphs; on a CPU, which has none, models are traced. The
other tests of engines run without either."""

import logging

import engines
import pytest
from engines import CONFIG, EXACT, THRESHOLD, agree, ask, tokens

PROMPTS = [tokens(count, seed) for seed, count in enumerate((1400, 40, 900, 300, 130, 700))]
DEFAULT = {**engines.COMPILED, "max_num_batched_tokens": 512}


@pytest.fixture
def said():
    """What vLLM and the plugin log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vllm").addHandler(handler)
    yield lines
    logging.getLogger("vllm").removeHandler(handler)


@pytest.fixture(scope="module")
def dense(llama):
    with engines.engine(llama, None, **DEFAULT) as llm:
        return list(map(engines.said, ask(llm, PROMPTS, generated=12)))


@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_without_skipping_answers_are_dense_attentions(llama, dense, said, ranking):
    """In two rounds, in which no kernel is compiled any more."""
    with engines.engine(llama, {**EXACT, "ranking": ranking}, **DEFAULT) as llm:
        captured = [line for line in said if "Graph capturing finished" in line]
        assert engines.CPU or captured, "no graph was captured"
        said.clear()
        rounds = [ask(llm, PROMPTS, generated=12) for _ in range(2)]
    assert not [line for line in said if " during inference: " in line], "a kernel was compiled"
    for answers in rounds:
        agree(answers, dense)


@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_what_is_skipped_does_not_depend_on_neighbours(llama, witness, ranking):
    """Bit for bit, as where nothing is captured: the witness says so."""
    with engines.engine(llama, {**CONFIG, "threshold": THRESHOLD, "ranking": ranking}, **DEFAULT) as llm:
        ask(llm, PROMPTS, generated=12)
    seen = witness.take()
    assert [step for step in seen.batches if len(step.sparse) > 1], "no step had two long prefills"
    assert 0.1 < seen.density < 0.9
