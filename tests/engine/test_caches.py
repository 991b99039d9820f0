"""Keys and values that are there already, that go and come again, and requests that end early."""

import engines
import pytest
import torch
from engines import CONFIG, EXACT, TOLERANCE, ask, of_answer, tokens
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_s2o import backend

SPARSE = {**CONFIG, "segment_len": 256, "threshold": 0.15}
KEPT = 1152
"""Tokens of 9 blocks, which are kept whole; they end inside a segment of 256."""
PREFIX, SUFFIX = tokens(KEPT, 1), tokens(500, 2)


def blocks_in_use(llm) -> int:
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - pool.get_num_free_blocks() - 1  # one stands for none


@pytest.mark.parametrize("s2o", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_a_cached_prefix(llama, witness, s2o):
    """A new suffix on a cached prefix is what a cold run of the same cuts computes, and errs as a run at once does."""
    question = PREFIX + SUFFIX
    with engines.engine(llama, s2o, enable_prefix_caching=True) as llm:
        (cold,) = ask(llm, [question], prompt_logprobs=None)
        at_once = witness.take()
        assert llm.reset_prefix_cache()
        ask(llm, [PREFIX], generated=1, prompt_logprobs=None)
        witness.take()
        (warm,) = ask(llm, [question], prompt_logprobs=None)
        after = witness.take()
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, KEPT)
    assert {(row.query_len, row.seq_len) for row in after.rows} == {(len(question) - KEPT, len(question))}
    with engines.engine(llama, s2o, max_num_batched_tokens=KEPT) as llm:
        (cut,) = ask(llm, [question], prompt_logprobs=None)
        cuts = witness.take()
    torch.testing.assert_close(of_answer(warm), of_answer(cut), atol=TOLERANCE, rtol=0)
    assert [row.query_len for row in cuts.rows] == [KEPT] * 3 + [len(question) - KEPT] * 3
    assert [row.visited for row in cuts.rows[3:]] == [row.visited for row in after.rows]
    if s2o is EXACT:
        torch.testing.assert_close(of_answer(warm), of_answer(cold), atol=TOLERANCE, rtol=0)
        assert at_once.density == after.density == 1
    else:
        assert at_once.density < 0.9
        assert cuts.rel_error <= 1.25 * at_once.rel_error


def test_a_dense_request_shares_no_prefix(llama, witness):
    """It computes its prompt, and leaves nothing for sparse ones."""
    prompt = PREFIX + SUFFIX[:1]
    with engines.engine(llama, SPARSE, enable_prefix_caching=True) as llm:
        ask(llm, [prompt], generated=1, prompt_logprobs=None)
        witness.take()
        (dense,) = ask(llm, [prompt], generated=1, prompt_logprobs=None, extra_args={"s2o": "dense"})
        assert (dense.num_cached_tokens, witness.take().rows) == (0, [])
        (again,) = ask(llm, [prompt], generated=1, prompt_logprobs=None)
        assert again.num_cached_tokens == KEPT


@pytest.fixture
def preempted(monkeypatch):
    """Requests that had to give up their caches."""
    names = []
    original = Scheduler._preempt_request

    def preempt(self, request, *args, **more):
        names.append(request.request_id)
        return original(self, request, *args, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return names


def test_preemption_and_recomputation(llama, witness, preempted):
    """Three prompts fit into the caches, and their answers do not. What was generated is prefilled again, with S2O."""
    prompts = [tokens(500, seed) for seed in range(3)]
    roomy = {"max_model_len": 1024}
    with engines.engine(llama, EXACT, **roomy) as llm:
        expected = ask(llm, prompts, generated=150, prompt_logprobs=None)
    assert not preempted
    witness.take()
    with engines.engine(llama, EXACT, num_gpu_blocks_override=1 + 3 * 4, **roomy) as llm:
        got = ask(llm, prompts, generated=150, prompt_logprobs=None)
        assert blocks_in_use(llm) == 0
    assert preempted
    again = [row.seq_len for row in witness.take().rows if row.query_len == row.seq_len > 500]
    assert again, "nothing was computed anew"
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        torch.testing.assert_close(of_answer(ours), of_answer(theirs), atol=TOLERANCE, rtol=0)


def test_requests_aborted_in_mid_prefill(llama, witness):
    """The others' answers stay, all blocks come back, and nothing is kept of those that went."""
    from vllm import SamplingParams

    staying, going = tokens(900, 3), tokens(1900, 4)
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4, logprobs=1, detokenize=False)
    with engines.engine(llama, EXACT, max_num_batched_tokens=512) as llm:
        (expected,) = ask(llm, [staying], prompt_logprobs=None)
        running = llm.llm_engine
        running.add_request("going", {"prompt_token_ids": going}, params)
        running.add_request("staying", {"prompt_token_ids": staying}, params)
        for _ in range(2):
            running.step()
        assert witness.take().batches[-1].seq_lens == [1024]
        assert [name for name in backend.prompts._all if name.startswith("going")]
        running.abort_request(["going"])
        ended = []
        while running.has_unfinished_requests():
            ended += [output for output in running.step() if output.finished]
        ask(llm, [tokens(8)], generated=1)  # what ended is told to the workers with the next step
        assert blocks_in_use(llm) == 0
    assert 1900 not in {row.seq_len for row in witness.take().rows}
    (got,) = ended
    torch.testing.assert_close(of_answer(got), of_answer(expected), atol=TOLERANCE, rtol=0)
    assert not [name for name in backend.prompts._all if name.startswith(("going", "staying"))]
