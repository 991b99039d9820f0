"""Each stage against the oracle: one test, run on the CPU path and on the Triton kernels."""

import bisect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE, LAYOUTS, error_bar, make_case
from processes import python_path

from vllm_s2o.attention import stages, to_device
from vllm_s2o.config import S2OParams
from vllm_s2o.kernels import naive
from vllm_s2o.kernels.rank import SORT_BLOCK
from vllm_s2o.kernels.tables import MAX_SCORED_TOGETHER
from vllm_s2o.plan import Segment, make_plan

IMPLEMENTATIONS = ["triton", "cuda"] if DEVICE.type == "cuda" else ["cpu", "triton"]

SHAPES = {
    "one sequence": dict(query_lens=[300], seq_lens=[300]),
    "odd lengths": dict(query_lens=[63, 111, 1], seq_lens=[63, 111, 1]),
    "last chunk": dict(query_lens=[77], seq_lens=[277]),
    "inside a segment": dict(query_lens=[5, 40], seq_lens=[133, 170]),
    "one token": dict(query_lens=[1, 1], seq_lens=[200, 129]),
    "empty rows": dict(query_lens=[0, 150, 0], seq_lens=[0, 150, 20]),
}
HEADS = {"mha": (2, 2), "gqa3": (3, 1), "gqa4": (4, 1), "gqa8": (8, 1), "gqa2x2": (4, 2)}


def one_wave(case, budget=None, segment_len=64, tile_size=32, num_rankings=None):
    plan = make_plan(
        case.query_lens, case.lens, segment_len=segment_len, tile_size=tile_size,
        num_rankings=num_rankings or case.key_cache.shape[2], max_slots=2**30, budget=budget,
    )  # fmt: skip
    (wave,) = to_device(plan, DEVICE).waves
    return wave


def rank(stage, case, wave, num_classes=32, num_rankings=None):
    return stage.rank_keys(
        case.query, case.key_cache, case.block_table, wave.segments, wave.wave.num_slots, num_classes,
        max_history=wave.wave.max_history, groups=wave.groups, num_rankings=num_rankings,
    )  # fmt: skip


def attend(stage, case, wave, slots, thresholds, interval=2, num_rankings=None):
    out = torch.full_like(case.query, float("nan"))
    pairs = stage.attend(
        case.query, case.key_cache, case.value_cache, case.block_table, wave.segments, wave.tiles, slots,
        thresholds, out, scale=case.scale, key_block=16, stop_interval=interval, tile_size=32,
        num_rankings=num_rankings,
    )  # fmt: skip
    return out, pairs.long()


def test_columns_of_the_segment_table():
    assert Segment._fields == (
        "seq", "query_row", "query_pos", "num_queries", "history", "visit_limit", "offset",
    )  # fmt: skip
    assert [naive.SEQ, naive.QUERY_ROW, naive.QUERY_POS, naive.NUM_QUERIES] == [0, 1, 2, 3]
    assert [naive.HISTORY, naive.VISIT_LIMIT, naive.OFFSET] == [4, 5, 6]


def each_ranking(implementation, case, wave, num_rankings=None):
    """(oracle's, the implementation's) slots of each history in order of importance: a permutation of it in which no
    key stands a class before a better one."""
    num_heads, num_kv_heads = case.query.shape[1], case.key_cache.shape[2]
    num_rankings = num_rankings or num_kv_heads
    group = num_heads // num_rankings
    theirs = rank(naive, case, wave, num_rankings=num_rankings)
    ours = rank(stages(implementation, DEVICE), case, wave, num_rankings=num_rankings)
    for segment in wave.segments.tolist():
        rows = slice(segment[naive.QUERY_ROW], segment[naive.QUERY_ROW] + segment[naive.NUM_QUERIES])
        for ranking in range(num_rankings):
            a, b = (naive.ranking_of(x, segment, ranking) for x in (theirs, ours))
            assert torch.equal(a.sort().values, b.sort().values)
            if not len(a):
                continue
            queries = case.query[rows, ranking * group : (ranking + 1) * group].float().flatten(0, 1)
            positions = torch.arange(len(a), device=DEVICE)
            history = naive.slots_of(case.block_table, segment[naive.SEQ], positions, case.key_cache.shape[1])
            keys = naive.read_rows(case.key_cache, history, ranking * num_kv_heads // num_rankings)
            by_position = naive.importance_classes(naive.importance(keys, queries), 32)
            by_slot = torch.zeros(int(history.max()) + 1, dtype=torch.int32, device=DEVICE)
            by_slot[history.long()] = by_position
            found = by_slot[b.long()]
            assert (found[1:] >= found[:-1] - 1).all()  # a key on a border may be rounded across it
            assert ((found[1:] >= found[:-1]).float().mean() > 0.95) or len(a) < 64
            yield a, b


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranked", ["kv_head", "query_head"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranking(implementation, shape, heads, ranked):
    num_heads, num_kv_heads = HEADS[heads]
    case = make_case(**SHAPES[shape], num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=32)
    num_rankings = S2OParams(ranking=ranked).num_rankings(num_heads, num_kv_heads)
    wave = one_wave(case, num_rankings=num_rankings)
    for a, b in each_ranking(implementation, case, wave, num_rankings):
        # Rounding may move a key across a class border, rarely.
        assert (a != b).float().mean() < 0.05 or len(a) < 64


def in_order(ours, theirs) -> int:
    """How many stand in the same order: a key that crosses a border moves all between its places by one."""
    place = {slot: at for at, slot in enumerate(theirs.tolist())}
    ends: list[int] = []
    for at in (place[slot] for slot in ours.tolist()):
        found = bisect.bisect_left(ends, at)
        ends[found : found + 1] = [at]
    return len(ends)


def assert_same_rankings(case, wave, num_rankings=None, moved=None):
    """Each history ranked as the oracle ranks it, up to keys that rounding moves across a class border.
    `moved`: the share of places that may hold another key; in short histories one key moves many."""
    for implementation in IMPLEMENTATIONS:
        for a, b in each_ranking(implementation, case, wave, num_rankings):
            assert in_order(b, a) >= 0.99 * len(a)
            assert moved is None or (a != b).sum() <= moved * len(a)


def test_ranking_of_histories_longer_than_a_sort_block():
    length = 2 * SORT_BLOCK + 700
    case = make_case([100], [length], num_heads=2, num_kv_heads=1, head_size=16)
    assert_same_rankings(case, one_wave(case), moved=0.01)


SHARING = [
    pytest.param(heads, count, id="{} of {}-{}".format(*heads, count), marks=marks)
    for heads in ((1, 1), (2, 2), (6, 2), (4, 1))
    for count in (MAX_SCORED_TOGETHER + 9, MAX_SCORED_TOGETHER, 23, 2)
    # Half a minute in the interpreter, and a quarter.
    for marks in [[pytest.mark.long] * (DEVICE.type == "cpu" and heads == (6, 2) and count >= MAX_SCORED_TOGETHER)]
]


@pytest.mark.parametrize(("heads", "count"), SHARING)
def test_ranking_of_segments_that_are_scored_together(heads, count):
    """Rankings of the same keys share an operand, as many as fit: less than one of them is full, several are."""
    num_heads, num_kv_heads = heads
    case = make_case([count * 16], [count * 16], num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=16)
    wave = one_wave(case, segment_len=16, tile_size=16, num_rankings=num_heads)
    assert_same_rankings(case, wave, num_heads, moved=0.01 if heads == (1, 1) and count > MAX_SCORED_TOGETHER else None)


@pytest.mark.parametrize("query_len, length", [(16, 64), (144, 144)], ids=["one segment", "several"])
@pytest.mark.parametrize("sharing", [16, 17, 40, 71])
def test_ranking_of_keys_that_many_heads_share(query_len, length, sharing):
    """More heads than the small operand has columns, and than the large one; a segment is cut between two of them."""
    case = make_case([query_len], [length], num_heads=sharing, num_kv_heads=1, head_size=16)
    wave = one_wave(case, segment_len=48, tile_size=16, num_rankings=sharing)
    assert_same_rankings(case, wave, sharing)


@pytest.mark.parametrize("implementation", ["naive", *IMPLEMENTATIONS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_ranking_of_bad_keys_is_a_permutation(implementation, bad):
    case = make_case([200], [200], head_size=32)
    case.key_cache[case.block_table[0, 1], 3, 0, 5] = bad
    case.query[130, 0, 0] = bad
    wave = one_wave(case)
    slots = rank(stages(implementation, DEVICE), case, wave)
    for segment in wave.segments.tolist():
        for kv_head in range(2):
            ranking = naive.ranking_of(slots, segment, kv_head).long()
            positions = torch.arange(segment[naive.HISTORY], device=DEVICE)
            history = naive.slots_of(case.block_table, 0, positions, 16)
            assert torch.equal(ranking.sort().values, history.long().sort().values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [*SHAPES, "fp16"])
def test_attend_stops_where_the_oracle_stops(implementation, shape):
    """The same rankings in, the same tiles stopped at the same key, the same output."""
    dtype = torch.float16 if shape == "fp16" else torch.float32
    case = make_case(**SHAPES.get(shape, SHAPES["last chunk"]), num_heads=4, num_kv_heads=2, head_size=32, dtype=dtype)
    wave = one_wave(case)
    slots = rank(naive, case, wave)
    thresholds = torch.tensor([0.0, 0.02, 0.05, 0.2], device=DEVICE)
    expected, expected_pairs = attend(naive, case, wave, slots, thresholds)
    out, pairs = attend(stages(implementation, DEVICE), case, wave, slots, thresholds)
    assert torch.equal(pairs, expected_pairs)
    assert (out.float() - expected.float()).abs().max() <= error_bar(case)[1]
    if shape == "one sequence":  # the rule must have had something to decide
        assert (pairs[:, 3] < pairs[:, 0]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("page", "dtype"),
    [(16, torch.float32), pytest.param(32, torch.float32, marks=pytest.mark.long), (128, torch.float16)],
    ids=str,
)
def test_layouts(implementation, layout, page, dtype):
    case = make_case([70, 90], [70, 170], layout=layout, page=page, head_size=64, dtype=dtype)
    wave = one_wave(case)
    slots = rank(stages(implementation, DEVICE), case, wave)
    thresholds = torch.zeros(4, device=DEVICE)
    out, _ = attend(stages(implementation, DEVICE), case, wave, slots, thresholds)
    exact, bar = error_bar(case)
    assert (out - exact).abs().max() <= bar


def test_params_defaults_are_valid():
    assert S2OParams().segment_len % S2OParams().tile_size == 0


def test_compiled_for_a_gpu():
    """What the interpreter takes, a compiler need not. Computing tiles again fits wherever computing them does."""
    helpers = Path(__file__).parents[1] / "helpers"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = python_path(helpers)
    script = helpers / "compile_triton.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    words = [line.split() for line in done.stdout.splitlines()]
    shared = {said[0]: int(said[1]) for said in words if len(said) == 2 and said[1].isdigit()}
    assert len(shared) == 10
    assert max(shared.values()) <= 227 * 1024
    assert max(shared["marked"], shared["marked_halves"]) < shared["attend"]
