"""Plans are arithmetic: every query in exactly one tile, every history whole, every wave within its room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_s2o import S2OParams
from vllm_s2o.attention import MAX_SLOTS, plan_step
from vllm_s2o.kernels import naive
from vllm_s2o.kernels.tables import MAX_SCORED_TOGETHER, score_groups
from vllm_s2o.plan import WHOLE, causal_pairs, dense_runs, make_plan, most_segments, threshold_share, workspace_slots

rows = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 500)), min_size=1, max_size=5)


@given(rows=rows, max_slots=st.integers(1, 5000))
def test_every_query_lies_in_one_tile(rows, max_slots):
    query_lens = [q for q, _ in rows]
    seq_lens = [q + before for q, before in rows]
    plan = make_plan(query_lens, seq_lens, segment_len=64, tile_size=16, num_rankings=2, max_slots=max_slots)
    covered = []
    for wave in plan.waves:
        assert wave.num_slots <= max_slots or len(wave.segments) == 1
        assert len(wave.segments) * 2 * wave.max_history <= 2 * max_slots or len(wave.segments) == 1
        end = 0
        for segment in wave.segments:
            assert segment.history % 64 == 0
            assert segment.history <= segment.query_pos < segment.history + 64
            assert segment.query_pos + segment.num_queries <= min(segment.history + 64, seq_lens[segment.seq])
            assert segment.offset == end
            end += 2 * segment.history
        assert end == wave.num_slots
        for tile in wave.tiles:
            segment = wave.segments[tile.segment]
            assert 0 < tile.rows <= 16
            covered += range(segment.query_row + tile.first, segment.query_row + tile.first + tile.rows)
            first = segment.query_pos + tile.first
            assert first // 16 == (first + tile.rows - 1) // 16, "borders are at absolute positions"
    assert sorted(covered) == list(range(sum(query_lens)))
    assert plan.causal_pairs == tuple(map(causal_pairs, query_lens, seq_lens))


def test_budget_rounds_up():
    plan = make_plan([10], [138], segment_len=64, tile_size=16, num_rankings=1, max_slots=10**6, budget=0.01)
    assert [s.visit_limit for s in plan.waves[0].segments] == [2]


@given(rows=rows, before_end=st.integers(-50, 400))
def test_dense_tiles_are_those_at_the_end(rows, before_end):
    query_lens, seq_lens = [q for q, _ in rows], [q + before for q, before in rows]
    plan = make_plan(
        query_lens, seq_lens, segment_len=64, tile_size=16, num_rankings=2, max_slots=5000,
        dense_from=[length - before_end for length in seq_lens],
    )  # fmt: skip
    for wave in plan.waves:
        for tile in wave.tiles:
            segment = wave.segments[tile.segment]
            end = segment.query_pos + tile.first + tile.rows
            assert (tile.share == 0) == (end > seq_lens[segment.seq] - before_end)


def test_dense_tiles_come_first():
    """A prompt's end beside the beginning of another one, which comes after it in the batch."""
    plan = make_plan(
        [32, 64], [200, 64], segment_len=64, tile_size=16, num_rankings=2, max_slots=5000, dense_from=[185, 300]
    )
    (wave,) = plan.waves
    tiles = [(wave.segments[tile.segment].query_pos + tile.first, tile.rows, tile.share == 0) for tile in wave.tiles]
    assert tiles == [
        (192, 8, True), (176, 16, True),
        *((first, 16, False) for first in range(0, 64, 16)), (168, 8, False),
    ]  # fmt: skip


@given(history=st.integers(0, 2**24), reference_len=st.integers(1, 2**24))
def test_the_share_of_the_thresholds(history, reference_len):
    """All of them up to a length; from there on what all of a history's blocks may lose together stays the same."""
    share = threshold_share(history, reference_len)
    assert threshold_share(history, None) == WHOLE
    if history <= reference_len:
        assert share == WHOLE
    else:
        assert 1 <= share <= WHOLE
        assert share == 1 or share * history <= WHOLE * reference_len
        assert (share + 1) * history > WHOLE * reference_len


def test_kernels_divide_thresholds_as_the_plan_does():
    assert naive.WHOLE == WHOLE


def test_shares_do_not_depend_on_the_cut():
    """A tile's share is that of its segment's place, in whichever chunk it is computed."""

    def shares(cuts: list[tuple[int, int]]) -> dict[int, int]:
        found = {}
        for query_len, seq_len in cuts:
            plan = make_plan(
                [query_len], [seq_len], segment_len=64, tile_size=16, num_rankings=1, max_slots=10**6, reference_len=100
            )
            for wave in plan.waves:
                for tile in wave.tiles:
                    segment = wave.segments[tile.segment]
                    found |= {segment.query_pos + tile.first + row: tile.share for row in range(tile.rows)}
        return found

    whole = shares([(500, 500)])
    assert whole == shares([(130, 130), (37, 167), (333, 500)])
    assert [whole[at] for at in (0, 127, 128, 191, 192, 499)] == [WHOLE, WHOLE, 51200, 51200, 34133, 14628]


def test_rows_not_chosen_have_no_work():
    plan = make_plan([10, 20, 30], [10, 20, 30], segment_len=64, tile_size=16, num_rankings=1, max_slots=99, seqs=[1])
    assert [s.query_row for s in plan.waves[0].segments] == [10]
    assert plan.causal_pairs == (0, 210, 0)


def test_dense_runs():
    assert dense_runs([1, 9, 1, 1, 9, 0], [1, 4]) == [(0, 1), (2, 4)]
    assert dense_runs([9, 1], [0]) == [(1, 2)]
    assert dense_runs([9], [0]) == []


def test_a_wave_fits_a_grid():
    plan = make_plan([1] * 70_000, [1] * 70_000, segment_len=16, tile_size=16, num_rankings=1, max_slots=99)
    assert sum(len(wave.tiles) for wave in plan.waves) == 70_000
    assert max(len(wave.tiles) for wave in plan.waves) <= 65_535


@given(rows=rows, segment_len=st.sampled_from([16, 64, 512]))
def test_most_segments(rows, segment_len):
    query_lens = [q + 5 for q, _ in rows]
    plan = make_plan(
        query_lens, [q + before for q, (_, before) in zip(query_lens, rows, strict=True)], segment_len=segment_len,
        tile_size=16, num_rankings=1, max_slots=10**9,
    )  # fmt: skip
    assert sum(len(w.segments) for w in plan.waves) <= most_segments(sum(query_lens), segment_len, 5)


def test_workspace_holds_one_history_and_the_useful_number():
    assert workspace_slots(131072, 8192, 512, 8, 56 * 2**20) == 18 * 131072 * 8
    assert workspace_slots(131072, 131072, 512, 8, 56 * 2**20) == 56 * 2**20
    assert workspace_slots(2**20, 512, 512, 64, 2**20) == 2**26


COUNTED = [(8192, 512, 1.0), (8192, 256, 2.43), (131072, 512, 3.76), (131072, 256, 3.7)]


@pytest.mark.parametrize("chunk, segment_len, times", COUNTED)
def test_more_rankings_read_the_keys_more_often(chunk, segment_len, times):
    """They fill more operands, and fewer segments fit a wave: `docs/how-it-works.md` says so of 131,072 tokens."""

    def read(num_rankings: int) -> int:
        """By 8 KV heads: `kernels/rank.py` reads keys once for so many of their rankings, longest histories first."""
        sharing, keys = num_rankings // 8, 0
        for end in range(chunk, 131072 + 1, chunk):
            slots = workspace_slots(131072, chunk, segment_len, num_rankings, MAX_SLOTS)
            plan = plan_step([chunk], [end], S2OParams(segment_len=segment_len), num_rankings, max_slots=slots)
            for wave in plan.waves:
                for first, count in score_groups(wave.segments):
                    turns = range(0, count * sharing, MAX_SCORED_TOGETHER)
                    keys += sum(wave.segments[first + turn // sharing].history for turn in turns)
        return keys

    assert read(32) / read(8) == pytest.approx(times, abs=0.06)
