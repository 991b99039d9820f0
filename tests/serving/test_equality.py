"""With tau = 0 nothing is skipped: the sparse path must say what dense attention says, in fp32 to the letter.

On a GPU there is no fp32 to compare in. In bf16 each path rounds in its own way and a token here or there may differ,
so that log-probabilities of the prompts are compared by their mean difference. That finds wrong rows and masks; that
nothing is skipped the density says, for rounding changes more than a small tau does.
"""

from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest
from serving import EXACT, MODEL_NAME

from vllm_s2o.quality.needles import needle
from vllm_s2o.step_log import prefills

# tests/engine has the same of engines without a server, of more models.
pytestmark = [pytest.mark.serving, pytest.mark.long]

TOLERANCE = 1e-3
MEAN_TOLERANCE_BF16 = 0.05
"""Three times what the two paths of the CPU differ by in bf16 (0.014 to 0.017 on these prompts)."""


@pytest.fixture(scope="module")
def prompts(count_tokens):
    return [needle(length, 0.5, 2, count_tokens).prompt for length in (1300, 900, 300)]


def complete(server, prompt, **more):
    more["prompt_logprobs"] = 1
    answer = server.client.completions.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=12, temperature=0, logprobs=5, extra_body=more
    )
    return answer.choices[0]


@pytest.fixture(scope="module")
def expected(request, s2o_tau0, prompts):
    """Of the platform's own attention. On a CPU that of the same server, asked to run dense: tests/engine, which needs
    one, compares engines without the flag."""
    if not EXACT:
        return [complete(request.getfixturevalue("dense"), prompt) for prompt in prompts]
    before = len(prefills(s2o_tau0.log))
    answers = [complete(s2o_tau0, prompt, vllm_xargs={"s2o": "dense"}) for prompt in prompts]
    assert len(prefills(s2o_tau0.log)) == before, "these were to be dense"
    return answers


def prompt_differences(got, want) -> list[float]:
    """Per token of the prompt, how far its log-probabilities lie apart."""
    differences = []
    # The first token has none. Each of the others: the prompt's own token, and the likeliest.
    for ours, theirs in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
        shared = ours.keys() & theirs.keys()
        assert shared
        differences.append(max(abs(ours[token]["logprob"] - theirs[token]["logprob"]) for token in shared))
    return differences


def assert_same_answer(got, want):
    differences = prompt_differences(got, want)
    if not EXACT:
        assert mean(differences) <= MEAN_TOLERANCE_BF16
        return
    assert max(differences) <= TOLERANCE
    assert got.text == want.text
    for ours, theirs in zip(got.logprobs.top_logprobs, want.logprobs.top_logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)


def test_answers_and_log_probabilities(s2o_tau0, prompts, expected):
    got = complete(s2o_tau0, prompts[0])
    assert len(got.prompt_logprobs) > 1024
    assert_same_answer(got, expected[0])

    steps = [step for step in prefills(s2o_tau0.log) if step.sparse_layers]
    assert steps, "the sparse path did not run"
    assert {step.density for step in steps} == {1.0}, "a pair was skipped"


def test_mixed_batches(s2o_tau0, prompts, expected):
    """Decoding and short sequences in the same steps as long prefills."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(s2o_tau0, prompt), prompts))
    for got, want in zip(answers, expected, strict=True):
        assert_same_answer(got, want)
