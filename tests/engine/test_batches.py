"""Steps of several prefills, chunks and decodes: no sequence depends on its neighbours, and cuts change little."""

import engines
import pytest
from engines import CONFIG, EXACT, THRESHOLD, agree, ask, tokens

PROMPTS = [tokens(count, seed) for seed, count in enumerate((1400, 40, 900, 300, 130, 700))]


@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_each_sequence_is_what_it_is_alone(llama, witness, ranking):
    """Bit for bit: the witness computes each one alone, from the same queries and caches."""
    config = {**CONFIG, "threshold": THRESHOLD, "ranking": ranking}
    with engines.engine(llama, config, max_num_batched_tokens=512) as llm:
        ask(llm, PROMPTS, generated=12)
    seen = witness.take()
    several = [step for step in seen.batches if len(step.sparse) > 1]
    assert several, "no step had two long prefills"
    beside = [
        step for step in seen.batches
        if any(count == 1 for count in step.query_lens) and any(step.query_lens[row] > 1 for row in step.sparse)
    ]  # fmt: skip
    assert beside, "no step had a decode beside a long prefill"
    assert any(step.seq_lens[row] > step.query_lens[row] for step in seen.batches for row in step.sparse)
    assert 0.1 < seen.density < 0.9, "nothing was skipped"


def test_without_skipping_a_batch_says_what_dense_attention_says(llama, witness):
    with engines.engine(llama, None) as llm:
        expected = ask(llm, PROMPTS, generated=12)
    with engines.engine(llama, EXACT, max_num_batched_tokens=500) as llm:
        got = ask(llm, PROMPTS, generated=12)
    agree(got, expected)
    seen = witness.take()
    assert seen.density == 1
    assert seen.rel_error <= engines.REL_ERRORS[engines.DTYPE]


def test_the_end_of_a_prompt_is_dense(llama, witness):
    """Of its last chunk alone, and with a decode beside it that has no part in that."""
    found = []
    for tail in (0, 100):
        config = {**CONFIG, "threshold": THRESHOLD, "dense_tail": tail}
        with engines.engine(llama, config, max_num_batched_tokens=400) as llm:
            ask(llm, [tokens(30, 8), tokens(1000, 9)], generated=8)
        rows = witness.take().rows
        assert sum(row.query_len for row in rows) == 3 * 1000
        found.append({(row.seq_len, layer % 3): row for layer, row in enumerate(rows)})
    without, with_tail = found
    for at, row in with_tail.items():
        if row.seq_len < 1000:
            assert row.visited == without[at].visited
            assert row.visited < row.causal or (row.seq_len < 400 and not engines.CPU), "larger tiles skip less"
        else:
            assert without[at].visited < row.visited <= row.causal


@pytest.mark.long
def test_thresholds_fall_with_length_alike_in_chunks(llama, witness):
    """By the place of a segment, not by what a step holds of a prompt: chunks that end with segments change nothing."""

    def visited(at_most: int, **more) -> list[int]:
        config = {**CONFIG, "min_seq_len": 64, "segment_len": 256, "threshold": THRESHOLD, **more}
        with engines.engine(llama, config, max_num_batched_tokens=at_most) as llm:
            ask(llm, [tokens(2000, 7)])
        rows = witness.take().rows
        return [sum(row.visited for row in rows[layer::3]) for layer in range(3)]

    falling, at_once = visited(512, reference_len=500), visited(engines.CONTEXT, reference_len=500)
    # In 16 bits a tile that is about to stop may stop a block sooner.
    assert falling == pytest.approx(at_once, rel=0 if engines.CPU else 0.01, abs=0)
    assert all(more > fewer for more, fewer in zip(at_once, visited(engines.CONTEXT), strict=True))


@pytest.fixture(scope="module")
def whole(llama):
    with pytest.MonkeyPatch.context() as patch:
        return prefilled(llama, engines.Witness(patch), engines.CONTEXT)


def prefilled(llama, witness, at_most: int) -> engines.Seen:
    """One long prompt, in chunks of a length at most, none of which is too short for S2O."""
    with engines.engine(
        llama, {**CONFIG, "min_seq_len": 64, "segment_len": 256, "threshold": THRESHOLD}, max_num_batched_tokens=at_most
    ) as llm:
        ask(llm, [tokens(2000, 7)])
    return witness.take()


@pytest.mark.parametrize("at_most", [700, 130])
def test_chunks(llama, whole, witness, at_most):
    """Where a chunk ends inside a segment, its segments' rankings come from fewer queries: the error against dense
    attention stays near that of a prompt that is computed at once, and so does the density of the whole prompt."""
    seen = prefilled(llama, witness, at_most)
    assert len(seen.rows) > len(whole.rows)
    assert sum(row.causal for row in seen.rows) == sum(row.causal for row in whole.rows)
    assert whole.density < 0.9 and whole.rel_error > 1e-3, "nothing was skipped"
    assert seen.rel_error <= 1.25 * whole.rel_error
    assert abs(seen.density - whole.density) <= 0.1 * whole.density
