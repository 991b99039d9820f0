"""With tau = 0 nothing is skipped: in fp32 the sparse path must say what dense attention says."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import MODEL_NAME

from vllm_s2o.quality.needles import needle
from vllm_s2o.stats import prefills

pytestmark = pytest.mark.serving

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def prompts(count_tokens):
    return [needle(length, 0.5, 2, count_tokens).prompt for length in (3000, 2200, 700)]


def complete(server, prompt, **extra):
    answer = server.client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=12, temperature=0, logprobs=5, extra_body=extra
    )
    return answer.choices[0]


@pytest.fixture(scope="module")
def expected(dense_fp32, prompts):
    return [complete(dense_fp32, prompt, prompt_logprobs=1) for prompt in prompts]


def assert_same_answer(got, want):
    assert got.text == want.text
    for ours, theirs in zip(got.logprobs.top_logprobs, want.logprobs.top_logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_answers_and_log_probabilities(s2o_tau0, prompts, expected):
    got = complete(s2o_tau0, prompts[0], prompt_logprobs=1)
    assert_same_answer(got, expected[0])

    assert len(got.prompt_logprobs) == len(expected[0].prompt_logprobs) > 2048
    # The first token has none. Each of the others: the prompt's own token, and the likeliest.
    for ours, theirs in zip(got.prompt_logprobs[1:], expected[0].prompt_logprobs[1:], strict=True):
        shared = ours.keys() & theirs.keys()
        assert shared
        assert {t: ours[t]["logprob"] for t in shared} == pytest.approx(
            {t: theirs[t]["logprob"] for t in shared}, abs=TOLERANCE
        )

    steps = [step for step in prefills(s2o_tau0.log) if step.sparse_layers]
    assert steps, "the sparse path did not run"
    assert {step.density for step in steps} == {1.0}, "a pair was skipped"


def test_mixed_batches(s2o_tau0, prompts, expected):
    """Decoding and short sequences in the same steps as long prefills."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(s2o_tau0, prompt), prompts))
    for got, want in zip(answers, expected, strict=True):
        assert_same_answer(got, want)
