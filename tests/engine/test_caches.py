"""Keys and values that are there already, that go and come again, and requests that end early."""

import engines
import pytest
import torch
from engines import CONFIG, EXACT, THRESHOLD, agree, ask, of_prompt, tokens
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_s2o import backend

SPARSE = {**CONFIG, "segment_len": 256, "threshold": THRESHOLD}
EARLY = {**CONFIG, "threshold": 0.9}
"""Skips of short prompts too."""
KEPT = 1152
"""Tokens of 9 blocks, which are kept whole; they end inside a segment of 256."""
PREFIX, SUFFIX = tokens(KEPT, 1), tokens(500, 2)


def blocks_in_use(llm) -> int:
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - pool.get_num_free_blocks() - 1  # one stands for none


@pytest.mark.parametrize(
    "s2o",
    [
        # Where these models skip they err so much that half of a history could be left out unseen. Not here.
        pytest.param(EXACT, id="exact"),
        pytest.param(SPARSE, id="sparse"),
        pytest.param({**SPARSE, "ranking": "kv_head"}, id="kv_head", marks=pytest.mark.long),
    ],
)
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
    agree([warm], [cut])
    assert [row.query_len for row in cuts.rows] == [KEPT] * 3 + [len(question) - KEPT] * 3
    # In 16 bits a tile that is about to stop may stop a block sooner.
    slack = 0 if engines.CPU else 0.01
    assert [row.visited for row in cuts.rows[3:]] == pytest.approx(
        [row.visited for row in after.rows], rel=slack, abs=0
    )
    if s2o is EXACT:
        agree([warm], [cold])
        assert at_once.density == after.density == 1
        assert max(at_once.rel_error, after.rel_error) <= engines.REL_ERRORS[engines.DTYPE]
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


@pytest.mark.parametrize("s2o", [pytest.param(EXACT, id="exact"), pytest.param(EARLY, id="sparse")])
def test_preemption_and_recomputation(llama, witness, preempted, s2o):
    """Three prompts fit into the caches, and their answers do not. What was generated is prefilled again, with S2O:
    where that skips, in another cut than before, which errs as the first one."""
    prompts = [tokens(500, seed) for seed in range(3)]
    roomy = {"max_model_len": 1024}
    with engines.engine(llama, s2o, **roomy) as llm:
        expected = ask(llm, prompts, generated=150, prompt_logprobs=None)
    assert not preempted
    before = witness.take()
    with engines.engine(llama, s2o, num_gpu_blocks_override=1 + 3 * 4, **roomy) as llm:
        got = ask(llm, prompts, generated=150, prompt_logprobs=None)
        assert blocks_in_use(llm) == 0
    assert preempted
    after = witness.take()
    again = [row.seq_len for row in after.rows if row.query_len == row.seq_len > 500]
    assert again, "nothing was computed anew"
    if s2o is EXACT:
        agree(got, expected)
    else:
        assert max(before.density, after.density) < 0.9
        assert after.rel_error <= 1.25 * before.rel_error
        assert [len(engines.said(one).tokens) for one in got] == [150] * 3


def test_requests_aborted_in_mid_prefill(llama, witness):
    """The others' answers stay, all blocks come back, and nothing is kept of those that went."""
    staying, going = tokens(900, 3), tokens(1900, 4)
    params = engines.sampling(prompt_logprobs=None)
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
    agree(ended, [expected])
    assert not [name for name in backend.prompts._all if name.startswith(("going", "staying"))]


@pytest.mark.skipif(engines.CPU, reason="on a CPU layers with caches in fp8 stay dense")
def test_caches_in_fp8(tmp_path, witness, told):
    """Keys, values and queries in 8 bits. Without skipping it is what FLASH_ATTN makes of the same, and nearer to that
    than caches in 16 bits are."""
    # Rounding grows less from layer to layer where queries and keys are normalised.
    model = engines.checkpoint(tmp_path / "model", "qwen3")
    prompts = [tokens(1400, 11), tokens(600, 12)]
    wide = {"dtype": "bfloat16"}  # FLASH_ATTN knows no other beside fp8
    with engines.engine(model, None, **wide) as llm:
        unquantised = ask(llm, prompts)
    with engines.engine(model, EXACT, kv_cache_dtype="fp8", **wide) as llm:
        expected = ask(llm, prompts, extra_args={"s2o": "dense"})
        assert not witness.take().rows
        got = ask(llm, prompts)
    seen = witness.take()
    assert {row.seq_len for row in seen.rows} == {1400, 600} and seen.density == 1
    assert seen.rel_error <= engines.REL_ERRORS["fp8"]
    agree(got, expected, "fp8")
    ours, theirs, exact = (torch.cat(list(map(of_prompt, said))) for said in (got, expected, unquantised))
    assert engines.distance(ours, theirs) < engines.distance(theirs, exact)
    assert any(line.startswith("s2o: 3 of 3 attention layers take kernels ") for line in told)
    assert not [line for line in told if "(layers" in line]
    with engines.engine(model, {**CONFIG, "threshold": THRESHOLD}, kv_cache_dtype="fp8", **wide) as llm:
        ask(llm, prompts)
    assert 0.1 < witness.take().density < 0.9
