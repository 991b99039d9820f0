"""Numbers that are NaN, infinite or huge, and inputs at the edge: what they may reach, and what they must not.

What holds, with a row being one query head of one token:

- A row that dense attention leaves finite is finite here, and right. Dense attention means that a row sees the keys up
  to its own, and nothing else (`cases.by_rows`).
- NaN in a query is in its row alone. NaN in a key or a value is in the rows that visit it: all later ones of its
  segment, and those of later segments that get so far. Of a value, only in its own element.
- What is not finite has no say in a ranking: the other queries and keys of a segment decide.
- Rows of other sequences, and of other KV heads, keep their bits.
"""

import functools
import itertools
import math

import pytest
import torch
from cases import DEVICE, LAYOUTS, by_rows, make_case, place_of

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import naive, prefill

IMPLEMENTATIONS = ["naive", "triton", "cuda"] if DEVICE.type == "cuda" else ["naive", "cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]
NAN, INF = math.nan, math.inf
BAD = {"nan": NAN, "inf": INF, "-inf": -INF}

# On a GPU, what the kernels for Hopper take. In Triton's interpreter a program of few numbers costs what one of many
# does.
TILE, BLOCK = (64, 32) if DEVICE.type == "cuda" else (16, 16)
RULES = dict(segment_len=TILE, tile_size=TILE, key_block=BLOCK, stop_interval=1)
PARAMS = {
    "dense": S2OParams(dense_tail=0, threshold=0, **RULES),
    "sparse": S2OParams(dense_tail=0, threshold=0.6, **RULES),
}
# Four segments of one sequence, and of another the last chunk, which begins inside a segment.
LENGTHS = dict(query_lens=[4 * TILE - 4, 5], seq_lens=[4 * TILE - 4, 2 * TILE + 2])
# The bad number stands in the first sequence's second segment, in the middle.
SEGMENT, TOKEN, SEGMENT_END, END = TILE, TILE + TILE // 2, 2 * TILE, 4 * TILE - 4


def thinned(keep, *axes):
    """All combinations of implementation and axes; of Triton's interpreter, which is slow, those that `keep` names."""
    every = itertools.product(IMPLEMENTATIONS, *axes)
    return [(i, *rest) for i, *rest in every if DEVICE.type == "cuda" or i != "triton" or keep(*rest)]


def new_case(dtype):
    return make_case(**LENGTHS, num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def case(request):
    return new_case(request.param)


def attend(case, params, implementation):
    return prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)


@functools.cache
def clean(dtype, params, implementation):
    """Output and pairs before anything was spoiled."""
    return attend(new_case(dtype), PARAMS[params], implementation)


def bar(case) -> float:
    """How far from exact: of values around 1 to 4, by numbers and weights of the case's type."""
    return {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[case.query.dtype]


def assert_right(case, out, exact):
    """Finite and right wherever dense attention is finite."""
    known = exact.isfinite()
    assert out[known].isfinite().all()
    assert (out.double() - exact)[known].abs().max() <= bar(case)


def out_of_reach(case) -> torch.Tensor:
    """[tokens, heads] bool: the other sequence, the other KV head, and what comes before the bad number's segment."""
    rows = torch.ones(case.query.shape[:2], dtype=torch.bool, device=DEVICE)
    rows[SEGMENT:END, :2] = False
    return rows


@pytest.mark.parametrize(
    ("implementation", "bad", "params"),
    thinned(lambda *kept: kept in (("nan", "dense"), ("nan", "sparse"), ("inf", "sparse")), BAD, PARAMS),
)
class TestOneBadNumber:
    def test_in_a_query(self, case, implementation, bad, params):
        before, _ = clean(case.query.dtype, params, implementation)
        case.query[TOKEN, 1, 5] = BAD[bad]
        out, stats = attend(case, PARAMS[params], implementation)
        spoiled = ~out.isfinite().all(-1)
        if bad == "nan":
            assert out[TOKEN, 1].isnan().all()
        spoiled[TOKEN, 1] = False
        assert not spoiled.any()
        others = out_of_reach(case)
        assert torch.equal(out[others], before[others])
        if params == "dense":
            assert_right(case, out, by_rows(case))
            assert torch.equal(stats.visited_pairs, stats.causal_pairs)

    def test_in_a_key(self, case, implementation, bad, params):
        before, _ = clean(case.query.dtype, params, implementation)
        case.key_cache[*place_of(case, 0, TOKEN), 0, 5] = BAD[bad]
        out, _ = attend(case, PARAMS[params], implementation)
        exact = by_rows(case)
        assert exact[:, :2].isnan().any()
        assert out[exact.isfinite()].isfinite().all()
        if bad == "nan":
            assert out[TOKEN:SEGMENT_END, :2].isnan().all(), "rows of its segment must visit it"
        others = out_of_reach(case)
        assert torch.equal(out[others], before[others])
        if params == "dense":
            assert_right(case, out, exact)
        elif params == "sparse":  # rows before it, ranked as before, in a tile that was computed again
            assert (out - before)[SEGMENT:TOKEN].abs().max() <= bar(case)

    def test_in_a_value(self, case, implementation, bad, params):
        before, stats_before = clean(case.query.dtype, params, implementation)
        case.value_cache[*place_of(case, 0, TOKEN), 0, 5] = BAD[bad]
        out, stats = attend(case, PARAMS[params], implementation)
        assert not out[TOKEN:SEGMENT_END, :2, 5].isfinite().any(), "rows of its segment must visit it"
        spoiled = ~out.isfinite()
        spoiled[TOKEN:END, :2, 5] = False
        assert not spoiled.any()
        others = out_of_reach(case)
        assert torch.equal(out[others], before[others])
        assert torch.equal(stats.visited_pairs, stats_before.visited_pairs), "values have no say in a stop"
        kept = out.isfinite()
        assert (out - before)[kept].abs().max() <= bar(case)
        if params == "dense":
            assert_right(case, out, by_rows(case))


# -- rankings ---------------------------------------------------------------------------------------------------------


def rankings(case, implementation, segment_len=64) -> list[torch.Tensor]:
    """Of each segment and KV head, as positions."""
    params = S2OParams(dense_tail=0, segment_len=segment_len, tile_size=16)
    (wave,) = attention.to_device(attention.plan_step(case.query_lens, case.lens, params, 2), DEVICE).waves
    slots = attention.stages(implementation, DEVICE).rank_keys(
        case.query, case.key_cache, case.block_table, wave.segments, wave.wave.num_slots, params.num_classes,
        max_history=wave.wave.max_history, groups=wave.groups,
    )  # fmt: skip
    found = []
    for segment in wave.segments.tolist():
        history = torch.arange(segment[naive.HISTORY], device=DEVICE)
        where = naive.slots_of(case.block_table, segment[naive.SEQ], history, case.key_cache.shape[1])
        for kv_head in range(2):
            ranking = naive.ranking_of(slots, segment, kv_head)
            assert torch.equal(ranking.sort().values, where.sort().values), "a ranking is a permutation"
            if len(history):
                position = torch.zeros(int(where.max()) + 1, dtype=torch.int64, device=DEVICE)
                position[where.long()] = history
                found.append(position[ranking.long()])
    return found


@pytest.mark.parametrize(("implementation", "bad"), thinned(lambda bad: bad == "nan", BAD))
def test_a_bad_query_leaves_the_ranking_to_the_others(case, implementation, bad):
    for token in (SEGMENT, TOKEN):  # the first of a segment is where a kernel takes variances around
        case.query[token, 1, 5] = BAD[bad]
    spoiled = rankings(case, implementation, TILE)
    case.query[case.query.isfinite().logical_not()] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(spoiled, rankings(case, implementation, TILE), strict=True))


@pytest.mark.parametrize(("implementation", "bad"), thinned(lambda bad: bad == "inf", BAD))
def test_a_bad_key_leaves_the_others_ranked(implementation, bad):
    """One of the sample that classes are divided by: it would put all other keys into one class."""
    case = make_case([64], [364], num_heads=4, num_kv_heads=2, head_size=32)
    before = rankings(case, implementation)
    position = naive.FIRST_TOKENS + 5 * naive.SAMPLE_EVERY
    case.key_cache[*place_of(case, 0, position), 0, 5] = BAD[bad]
    after = rankings(case, implementation)
    for kv_head, (old, new) in enumerate(zip(before, after, strict=True)):
        if kv_head % 2:
            assert torch.equal(old, new)
            continue
        count = len(old) // 5
        kept = set(old[:count].tolist()) & set(new[:count].tolist())
        assert len(kept) >= 0.9 * count
        assert len(set(range(count)) & kept) < 0.5 * count, "not the order of positions"


@pytest.mark.parametrize(
    ("implementation", "what", "bad"), thinned(lambda _, bad: bad > 0, ["query", "key_cache"], [NAN, INF, -INF, 1e30])
)
def test_nothing_to_rank_by_is_the_order_of_positions(implementation, what, bad):
    case = make_case([40, 90], [100, 90], num_heads=4, num_kv_heads=2, head_size=32)
    getattr(case, what).fill_(bad)
    for ranking in rankings(case, implementation):
        assert torch.equal(ranking, torch.arange(len(ranking), device=DEVICE))


# -- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits(case, implementation):
    """Queries of zeros: a row is the mean of the values that it visits, in the order of positions."""
    case.query.zero_()
    for params in (PARAMS["dense"], PARAMS["sparse"]):
        out, stats = attend(case, params, implementation)
        _, want = attend(case, params, "naive")
        assert torch.equal(stats.visited_pairs, want.visited_pairs)
        assert (stats.visited_pairs < stats.causal_pairs).any() == (params.threshold > 0)
        assert_right(case, out, mean_of_visited(case, params))


def mean_of_visited(case, params) -> torch.Tensor:
    """By hand: a step of n keys adds n / (rows seen + n) to a row's sum."""
    out = torch.empty(case.query.shape, dtype=torch.float64, device=DEVICE)
    plan = attention.plan_step(case.query_lens, case.lens, params, 2)
    page = case.key_cache.shape[1]
    for wave in plan.waves:
        for tile in wave.tiles:
            segment = wave.segments[tile.segment]
            inside = [segment.query_pos - segment.history + tile.first + i + 1 for i in range(tile.rows)]
            seen = 0
            while seen < segment.history:
                step = BLOCK * naive.step_blocks(seen // BLOCK, params.stop_interval)
                new = min(step, segment.history - seen)
                gain = new / (inside[0] + seen + new) / -(-new // BLOCK)  # the tile's first row gains most
                seen += new
                if gain < params.threshold:
                    break
            for i, own in enumerate(inside):
                keys = torch.tensor([*range(seen), *range(segment.history, segment.history + own)], device=DEVICE)
                blocks = case.block_table[segment.seq, keys // page].long()
                mean = case.value_cache[blocks, keys % page].double().mean(0)
                out[segment.query_row + tile.first + i] = mean.repeat_interleave(2, 0)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_keys(case, implementation):
    for seq, length in enumerate(case.lens):
        for position in range(length):
            case.key_cache[*place_of(case, seq, position)] = 1.0
    out, _ = attend(case, PARAMS["dense"], implementation)
    assert_right(case, out, by_rows(case))
    out, stats = attend(case, PARAMS["sparse"], implementation)
    assert out.isfinite().all()
    assert (stats.visited_pairs < stats.causal_pairs).any()
    _, want = attend(case, PARAMS["sparse"], "naive")
    assert torch.equal(stats.visited_pairs, want.visited_pairs)


@pytest.mark.parametrize(
    ("implementation", "factor", "params"),
    thinned(lambda *kept: kept in ((1e4, "dense"), (1e18, "dense")), [1e2, 1e4, 1e7, 1e15, 1e18], PARAMS),
)
def test_huge_logits(case, implementation, factor, params):
    """Queries and keys that many times as large, to the bound of what their product may be: one key takes all."""
    factor = min(factor, 5e3) if case.query.dtype == torch.float16 else factor
    query, keys = (factor * case.query.float()).to(case.query), (factor * case.key_cache.float()).to(case.query)
    case.query, case.key_cache = query, keys
    out, _ = attend(case, PARAMS[params], implementation)
    assert out.isfinite().all()
    if params == "dense":
        exact = by_rows(case)
        exact[~clear(case)] = NAN
        assert exact.isfinite().any(-1).float().mean() > 0.5
        assert_right(case, out, exact)


def clear(case) -> torch.Tensor:
    """[tokens, heads] bool: rows whose largest logits differ by more than rounding does, or hardly matter."""
    clear = torch.zeros(case.query.shape[:2], dtype=torch.bool, device=DEVICE)
    starts, page = case.query_start_loc.tolist(), case.key_cache.shape[1]
    for seq, length in enumerate(case.lens):
        positions = torch.arange(length, device=DEVICE)
        keys = case.key_cache[case.block_table[seq, positions // page].long(), positions % page].double()
        for row in range(starts[seq], starts[seq + 1]):
            seen = keys[: length - (starts[seq + 1] - row) + 1].repeat_interleave(2, 1)
            query = case.query[row].double()
            logits, size = (query * seen).sum(-1), query.norm(dim=-1) * seen.norm(dim=-1).amax(0)
            best = logits.topk(min(2, len(seen)), 0).values
            # Products of 64 numbers in fp32.
            clear[row] = (best[0] - best[-1] > 1e-5 * size + 30 / case.scale) | (len(seen) == 1)
    return clear


# -- edges ------------------------------------------------------------------------------------------------------------

EDGES = {
    "no sequences": ([], []),
    "no queries": ([0, 0], [30, 0]),
    "one token": ([1], [1]),
    "one token each": ([1, 1, 1], [1, 40, 2]),
    "empty between": ([0, 3, 0, 35, 0], [0, 3, 20, 70, 33]),
    "at segment borders": ([32, 1, 31], [64, 33, 63]),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("edge", EDGES)
def test_short_and_empty_sequences(implementation, edge):
    case = make_case(*EDGES[edge], num_heads=4, num_kv_heads=2, head_size=32)
    params = S2OParams(dense_tail=0, threshold=0, segment_len=32, tile_size=16, key_block=16)
    out, stats = attend(case, params, implementation)
    assert out.shape == case.query.shape
    assert torch.equal(stats.visited_pairs, stats.causal_pairs)
    if len(out):
        assert_right(case, out, by_rows(case))


GARBAGE = [-1, -(2**31), 2**31 - 1, 2**30, 10_000, 0]


@pytest.mark.parametrize(
    ("implementation", "layout", "params"),
    thinned(lambda *kept: kept in (("joined_rows", "sparse"), ("transposed_keys", "dense")), LAYOUTS, PARAMS),
)
def test_what_is_no_sequences_is_not_read(implementation, layout, params):
    """Table entries beyond a sequence and of rows without queries are anything, and so is the memory between: NaN."""
    lengths = ([20, 0, 37, 1], [55, 40, 37, 18])
    case, spoiled = (make_case(*lengths, num_heads=4, num_kv_heads=2, head_size=64, layout=layout) for _ in range(2))
    page = case.key_cache.shape[1]
    used = torch.zeros(case.key_cache.shape[:2], dtype=torch.bool, device=DEVICE)
    for seq in (0, 2, 3):
        for position in range(case.lens[seq]):
            used[place_of(case, seq, position)] = True
    for cache in (spoiled.key_cache, spoiled.value_cache):
        cache[~used] = NAN
    garbage = torch.tensor(GARBAGE, dtype=torch.int32).repeat(10).to(DEVICE)
    for seq, length in enumerate(case.lens):
        held = 0 if seq == 1 else -(-length // page)
        spoiled.block_table[seq, held:] = garbage[: spoiled.block_table.shape[1] - held].roll(seq)
    params = PARAMS[params].model_copy(update=dict(segment_len=32, tile_size=16, key_block=16))
    out, stats = attend(case, params, implementation)
    again, stats_again = attend(spoiled, params, implementation)
    assert torch.equal(out, again)
    assert torch.equal(stats.visited_pairs, stats_again.visited_pairs)


# -- tiles that are computed again ------------------------------------------------------------------------------------


@pytest.fixture
def reports(monkeypatch):
    """What the fast kernel reports of the tiles, before any is computed again."""
    seen, again = [], prefill.attend_marked

    def watch(*args, **rules):
        seen.append(args[9].clone())
        again(*args, **rules)

    monkeypatch.setattr(prefill, "attend_marked", watch)
    return seen


def marked(reports) -> list[list[bool]]:
    (report,) = reports
    return (report[..., 1:] > 0).any(-1).tolist()


def test_no_tile_is_computed_twice_without_need(reports):
    attend(new_case(torch.float32), PARAMS["sparse"], "triton")
    assert not any(map(any, marked(reports)))


def test_tiles_of_a_bad_value_are_computed_again(reports):
    case = new_case(torch.float32)
    case.value_cache[*place_of(case, 0, TOKEN), 0, 5] = NAN
    attend(case, PARAMS["dense"], "triton")
    plan = attention.plan_step(case.query_lens, case.lens, PARAMS["dense"], 2)
    (wave,) = plan.waves
    for tile, marks in zip(wave.tiles, marked(reports), strict=True):
        segment = wave.segments[tile.segment]
        reached = segment.seq == 0 and segment.query_pos + tile.first + tile.rows > TOKEN
        assert marks == [reached, reached, False, False]


def test_tiles_of_huge_logits_are_computed_again(reports):
    """Also where the result is finite: with a fused multiplication it may be wrong."""
    case = new_case(torch.float32)
    case.query[SEGMENT:SEGMENT_END] *= 1e7
    out, _ = attend(case, PARAMS["sparse"], "triton")
    assert out.isfinite().all()
    assert sorted(map(sum, marked(reports))) == [0, 0, 0, 0, 0, 4], "one tile of all heads"


@pytest.mark.parametrize("parts", [1, 2])
def test_only_marked_tiles_are_computed_again(parts):
    """One or two halves of a tile may have marked it."""
    case = new_case(torch.float32)
    params = PARAMS["sparse"]
    (wave,) = attention.to_device(attention.plan_step(case.query_lens, case.lens, params, 2), DEVICE).waves
    stage = attention.stages("triton", DEVICE)
    slots = stage.rank_keys(
        case.query, case.key_cache, case.block_table, wave.segments, wave.wave.num_slots, 32,
        max_history=wave.wave.max_history, groups=wave.groups,
    )  # fmt: skip
    tensors = (case.query, case.key_cache, case.value_cache, case.block_table, wave.segments, wave.tiles, slots)
    thresholds = torch.full((4,), params.threshold, device=DEVICE)
    rules = dict(scale=case.scale, value_scale=1.0, key_block=BLOCK, stop_interval=1, tile_size=TILE)
    expected, out = (torch.full_like(case.query, NAN) for _ in range(2))
    pairs = stage.attend(*tensors, thresholds, expected, **rules)
    report = torch.zeros(len(wave.tiles), 4, 1 + parts, dtype=torch.int32, device=DEVICE)
    chosen = [(2, 3, 1), (len(wave.tiles) - 1, 0, parts)]
    for tile, head, part in chosen:
        report[tile, head, part] = 1
    prefill.attend_marked(*tensors, thresholds, out, report, **rules)
    rows = torch.zeros(case.query.shape[:2], dtype=torch.bool)
    for tile, head, _ in chosen:
        index, first, count, _ = wave.tiles[tile].tolist()
        begin = wave.segments[index, naive.QUERY_ROW] + first
        rows[begin : begin + count, head] = True
        assert report[tile, head, 0] == pairs[tile, head]
    assert torch.equal(out.isfinite().all(-1).cpu(), rows)
    assert (out - expected)[rows.to(DEVICE)].abs().max() <= bar(case)
    report[*torch.tensor([c[:2] for c in chosen]).T] = 0
    assert not report.any()
