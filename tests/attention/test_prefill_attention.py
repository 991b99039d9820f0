"""The public function: dense at threshold 0, the same on every path, and clear about bad arguments."""

import itertools

import pytest
import torch
from cases import DEVICE, LAYOUTS, error_bar, make_case

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import naive
from vllm_s2o.plan import WHOLE, most_segments, threshold_share, workspace_slots

IMPLEMENTATIONS = ["triton", "cuda"] if DEVICE.type == "cuda" else ["cpu", "triton"]
DENSE = S2OParams(dense_tail=0, threshold=0, segment_len=64, tile_size=32, key_block=16)
SPARSE = S2OParams(dense_tail=0, threshold=0.05, segment_len=64, tile_size=32, key_block=16)

# Triton's interpreter computes on NumPy arrays, which know no bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


def at_length(implementation, *more):
    """A case of which others of the same test tell most: where Triton is interpreted, only the long tests have it."""
    slow = implementation == "triton" and DEVICE.type == "cpu"
    return pytest.param(implementation, *more, marks=[pytest.mark.long] * slow)


def dtypes(implementation):
    return [torch.float32, torch.float16, torch.bfloat16] if implementation == "cpu" else DTYPES


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(i, d) for i in IMPLEMENTATIONS for d in dtypes(i)],
    ids=lambda v: str(v).removeprefix("torch."),
)
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_threshold_zero_is_dense(implementation, head_size, dtype):
    case = make_case(
        [63, 111, 1], [130, 111, 70], num_heads=3, num_kv_heads=1, head_size=head_size, dtype=dtype, page=32
    )
    exact, bar = error_bar(case)
    out, stats = prefill_attention(**case.arguments, params=DENSE, return_stats=True, implementation=implementation)
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() <= bar
    assert torch.equal(stats.visited_pairs, stats.causal_pairs)


def test_the_oracle_is_dense_at_threshold_zero():
    case = make_case([63, 111, 1], [130, 111, 70])
    exact, bar = error_bar(case)
    out = prefill_attention(**case.arguments, params=DENSE, implementation="naive")
    assert (out - exact).abs().max() <= bar
    assert (naive.dense_attention(**case.arguments) - exact).abs().max() <= bar


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gqa_ratios(implementation, heads):
    case = make_case([40, 90], [170, 90], num_heads=heads[0], num_kv_heads=heads[1], head_size=32)
    exact, bar = error_bar(case)
    out = prefill_attention(**case.arguments, params=DENSE, implementation=implementation)
    assert (out - exact).abs().max() <= bar


@pytest.mark.parametrize(
    ("implementation", "layout"),
    [at_length(*case) if case[1] != "joined_blocks" else case for case in itertools.product(IMPLEMENTATIONS, LAYOUTS)],
)
def test_sparse_equals_the_oracle(implementation, layout):
    """Ranking, order of visits and stops included: any difference in a stop shows in the visited pairs."""
    case = make_case([200, 64], [300, 130], layout=layout, num_heads=6, num_kv_heads=2, head_size=64)
    expected, want = prefill_attention(**case.arguments, params=SPARSE, return_stats=True, implementation="naive")
    out, stats = prefill_attention(**case.arguments, params=SPARSE, return_stats=True, implementation=implementation)
    assert (stats.visited_pairs < stats.causal_pairs).any()
    if DEVICE.type == "cpu":
        assert torch.equal(stats.visited_pairs, want.visited_pairs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        return
    # Elsewhere products are summed in another order: a key may cross a class border and move a stop by one test.
    slack = SPARSE.tile_size * SPARSE.key_block * SPARSE.stop_interval
    assert (stats.visited_pairs - want.visited_pairs).abs().max() <= slack
    close = (out - expected).abs().amax((1, 2)) < 1e-4
    assert close.float().mean() > 0.8


def laid_out(cache: torch.Tensor, *order: int) -> torch.Tensor:
    """The same numbers, in memory with dimensions in this order, and a gap where a stride would be even."""
    strides, step = [0] * cache.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step = (step * cache.shape[dim]) | 1
    memory = torch.full((step * 2,), torch.nan, dtype=cache.dtype, device=cache.device)
    return memory.as_strided(cache.shape, strides).copy_(cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_small_keys_may_lie_apart(implementation, dtype):
    """In blocks of 64 keys, the assembler of Triton 3.6 took the values of such a product from anywhere."""
    case = make_case([40, 90], [170, 90], head_size=32, dtype=dtype)
    exact, bar = error_bar(case)
    params = DENSE.model_copy(update={"tile_size": 64, "key_block": 64})
    apart = {
        "key_cache": laid_out(case.key_cache, 0, 2, 3, 1), "value_cache": laid_out(case.value_cache, 0, 2, 1, 3),
    }  # fmt: skip
    assert apart["key_cache"].stride() == (1091, 1, 545, 17)
    out = prefill_attention(**case.arguments | apart, params=params, implementation=implementation)
    assert (out.float() - exact).abs().max() <= bar


def test_stats_count_pairs():
    case = make_case([100, 0, 30], [100, 7, 130])
    _, stats = prefill_attention(**case.arguments, params=DENSE, return_stats=True)
    assert stats.causal_pairs[:, 0].tolist() == [100 * 101 // 2, 0, 30 * 100 + 30 * 31 // 2]
    assert stats.visited_pairs.dtype == stats.causal_pairs.dtype == torch.int64
    assert stats.visited_pairs.shape == stats.causal_pairs.shape == (3, 4)


@pytest.mark.parametrize("implementation", ["naive", *IMPLEMENTATIONS])
def test_budget_visits_its_share(implementation):
    case = make_case([256], [256])
    params = S2OParams(dense_tail=0, budget=0.25, segment_len=64, tile_size=32, key_block=16, threshold=0.9)
    _, stats = prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)
    inside = 4 * 64 * 65 // 2
    assert stats.visited_pairs[0].tolist() == [inside + sum(64 * h // 4 for h in (64, 128, 192))] * 4


@pytest.mark.parametrize(
    ("implementation", "rule"),
    [
        *(case for case in itertools.product(["naive", *IMPLEMENTATIONS], [dict(threshold=0.3)])),
        *(at_length(*case) for case in itertools.product(["naive", *IMPLEMENTATIONS], [dict(budget=0.1)])),
    ],
)
def test_the_end_of_a_prompt_attends_to_everything(implementation, rule):
    """To whole tiles, wherever chunks end; before it nothing changes."""
    case = make_case([300, 150, 40], [300, 350, 150])
    params = S2OParams(**rule, dense_tail=0, segment_len=64, tile_size=32, key_block=16)
    some, few = prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)
    out, stats = prefill_attention(
        **case.arguments, params=params.model_copy(update={"dense_tail": 40}), prompt_lens=[300, 391, 160],
        return_stats=True, implementation=implementation,
    )  # fmt: skip
    # Positions from 260 on of the first prompt, in the tiles from 256 on; none of this chunk of the second; from 120 on
    # of the third, whose chunk begins at 110.
    tail = torch.zeros(490, dtype=torch.bool, device=DEVICE)
    tail[256:300] = tail[450:] = True
    exact, bar = error_bar(case)
    assert (out[tail] - exact[tail]).abs().max() <= bar
    assert (some[tail] - exact[tail]).abs().max() > 10 * bar
    assert torch.equal(out[~tail], some[~tail])
    assert (stats.visited_pairs > few.visited_pairs).any(1).tolist() == [True, False, True]
    assert torch.equal(stats.visited_pairs[2], stats.causal_pairs[2])


@pytest.mark.parametrize("implementation", ["naive", *IMPLEMENTATIONS])
def test_thresholds_fall_with_the_history(implementation):
    """Each segment is what a threshold of its own would make of it."""
    case = make_case([250], [250])
    params = SPARSE.model_copy(update={"threshold": (0.2, 0.5, 0.0, 0.8)})
    fixed = prefill_attention(**case.arguments, params=params, implementation=implementation)
    falling = params.model_copy(update={"reference_len": 100})
    out = prefill_attention(**case.arguments, params=falling, implementation=implementation)
    assert torch.equal(out[:128], fixed[:128]) and not torch.equal(out[128:], fixed[128:])
    for history in range(0, 250, 64):
        share = threshold_share(history, 100) / WHOLE
        assert share == (1 if history < 100 else pytest.approx(100 / history, rel=1e-4))
        rows = slice(history, min(history + 64, 250))
        starts, length = torch.tensor([0, rows.stop - history]), torch.tensor([rows.stop])
        same = prefill_attention(
            **case.arguments | {"query": case.query[rows], "query_start_loc": starts.int().to(DEVICE),
            "seq_lens": length.int().to(DEVICE)}, implementation=implementation,
            params=params.model_copy(update={"threshold": tuple(value * share for value in params.threshold)}),
        )  # fmt: skip
        assert torch.equal(out[rows], same)


@pytest.mark.parametrize("implementation", ["naive", *IMPLEMENTATIONS])
def test_a_ranking_for_each_query_head(implementation):
    """What a model would compute whose query heads share no keys, and nothing else."""
    case = make_case([250, 1, 90], [250, 70, 300])
    params = SPARSE.model_copy(update={"threshold": (0.2, 0.05, 0.4, 0.02), "ranking": "query_head"})
    options = dict(return_stats=True, implementation=implementation)
    out, stats = prefill_attention(**case.arguments, params=params, **options)
    caches = {name: case.arguments[name].repeat_interleave(2, 2) for name in ("key_cache", "value_cache")}
    alone, expected = prefill_attention(**case.arguments | caches, params=params, **options)
    assert torch.equal(stats.visited_pairs, expected.visited_pairs)
    assert (out - alone).abs().max() < 1e-5
    shared, few = prefill_attention(
        **case.arguments, params=params.model_copy(update={"ranking": "kv_head"}), **options
    )
    assert not torch.equal(stats.visited_pairs, few.visited_pairs) and (out - shared).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threshold_per_head(implementation):
    case = make_case([300], [300])
    params = SPARSE.model_copy(update={"threshold": (0.0, 0.05, 0.2, 0.9)})
    _, stats = prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)
    visited = stats.visited_pairs[0].tolist()
    assert visited[0] == stats.causal_pairs[0, 0]
    assert visited[0] > visited[1] > visited[3]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_at_segment_borders_change_nothing(implementation):
    """A prompt cut at segment borders gives the bits of the whole prompt."""
    case = make_case([320], [320])
    whole = prefill_attention(**case.arguments, params=SPARSE, implementation=implementation)
    for begin, end in ((0, 64), (64, 192), (192, 320)):
        part = case.arguments | {
            "query": case.query[begin:end],
            "query_start_loc": torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
            "seq_lens": torch.tensor([end], dtype=torch.int32, device=DEVICE),
        }
        chunk = prefill_attention(**part, params=SPARSE, implementation=implementation)
        if implementation == "cpu":  # matrix products of other shapes round differently
            torch.testing.assert_close(chunk, whole[begin:end], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(chunk, whole[begin:end])


@pytest.mark.parametrize("implementation", map(at_length, IMPLEMENTATIONS))
def test_neighbours_do_not_matter(implementation):
    together = make_case([130, 70, 200], [130, 170, 200])
    batch = prefill_attention(**together.arguments, params=SPARSE, implementation=implementation)
    starts = together.query_start_loc.tolist()
    for seq in range(3):
        rows = slice(starts[seq], starts[seq + 1])
        alone = together.arguments | {
            "query": together.query[rows],
            "block_table": together.block_table[seq : seq + 1],
            "query_start_loc": torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=DEVICE),
            "seq_lens": together.seq_lens[seq : seq + 1],
        }
        single = prefill_attention(**alone, params=SPARSE, implementation=implementation)
        assert torch.equal(single, batch[rows])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_waves_change_nothing(implementation, monkeypatch):
    """A workspace too small for all rankings at once is used several times."""
    case = make_case([320], [320])
    whole = prefill_attention(**case.arguments, params=SPARSE, implementation=implementation)
    plans = []
    small = attention.plan_step
    monkeypatch.setattr(
        attention, "plan_step", lambda *a, **k: plans.append(small(*a, **k, max_slots=700)) or plans[-1]
    )
    waves = prefill_attention(**case.arguments, params=SPARSE, implementation=implementation)
    assert len(plans[0].waves) > 1
    assert all(len(w.segments) == 1 or w.num_slots <= 700 for w in plans[0].waves)
    torch.testing.assert_close(waves, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segment_len", [256, 512])
@pytest.mark.parametrize("rankings", [8, 32, 128])
def test_workspace_of_a_large_model_is_bounded(rankings, segment_len):
    """Llama-3.1-8B at 131,072 tokens, in one chunk or beside many shorter prompts, and models with more heads."""
    shape, most = (rankings, 128), 2**29
    params = S2OParams(segment_len=segment_len)
    for tokens in (131072, 8192):
        slots = workspace_slots(131072, tokens, segment_len, rankings, attention.MAX_SLOTS)
        bound = attention.most_buffers(slots, most_segments(tokens, segment_len, 256), shape, 32)
        assert size_of(bound) <= most
        rows = [[tokens], [tokens // 2] + [256] * (tokens // 512)]
        for query_lens in rows:
            seq_lens = [131072, *[4096] * (len(query_lens) - 1)]
            plan = attention.plan_step(query_lens, seq_lens, params, rankings, max_slots=slots)
            used = attention.to_device(plan, torch.device("cpu")).buffers(128, 32)
            assert all(u[0][0] <= b[0][0] for u, b in zip(used, bound, strict=True))


def size_of(buffers):
    return sum(shape[0] * dtype.itemsize for shape, dtype in buffers)


def strided(tensor):
    """The same values, with a gap between neighbours of the last dimension."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "block_table"])
def test_any_strides(implementation, name):
    case = make_case([40, 100], [60, 100])
    expected = prefill_attention(**case.arguments, params=SPARSE, implementation=implementation)
    arguments = case.arguments | {name: strided(getattr(case, name))}
    assert arguments[name].stride(-1) == 2
    assert torch.equal(prefill_attention(**arguments, params=SPARSE, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_of_more_elements_than_32_bits_count(implementation):
    pages, page = 1_200_000, 16
    cache = torch.empty(pages, page, 2, 64, dtype=torch.float16, device=DEVICE)  # memory that is not touched costs none
    table = torch.tensor([[pages - 1, 5, pages - 7, pages // 2, 9, pages - 100]], dtype=torch.int32, device=DEVICE)
    for block in table[0].tolist():
        cache[block] = torch.randn(page, 2, 64).to(cache)
    arguments = dict(
        query=torch.randn(40, 4, 64).to(cache), key_cache=cache, value_cache=cache, block_table=table,
        query_start_loc=torch.tensor([0, 40], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([90], dtype=torch.int32, device=DEVICE), scale=0.125,
    )  # fmt: skip
    params = S2OParams(dense_tail=0, threshold=0, segment_len=16, tile_size=16, key_block=16)
    out = prefill_attention(**arguments, params=params, implementation=implementation)
    torch.testing.assert_close(out.float(), naive.dense_attention(**arguments), rtol=2e-3, atol=2e-3)


def test_out_is_written_in_place_and_other_rows_are_left_alone():
    case = make_case([40, 100], [40, 100])
    plan = attention.plan_step(case.query_lens, case.lens, DENSE, 4, [1])
    out = torch.full_like(case.query, 7.0)
    attention.run(
        case.query, case.key_cache, case.value_cache, case.block_table, attention.to_device(plan, DEVICE),
        DENSE, case.scale, out,
    )  # fmt: skip
    assert (out[:40] == 7).all()
    exact, bar = error_bar(case)
    assert (out[40:] - exact[40:]).abs().max() <= bar


def bad(change, message):
    return pytest.param(change, message, id=message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(lambda c: {"query": c.query[0]}, "query must be"),
        bad(lambda c: {"value_cache": c.value_cache[:, :8]}, "must both be"),
        bad(lambda c: {"query": c.query[..., :32]}, "head_size differs"),
        bad(lambda c: {"query": c.query[:, :3]}, "multiple of the 2 KV heads"),
        bad(lambda c: {"query": c.query.half()}, "share one dtype"),
        bad(lambda c: {"scale": 0.0}, "scale must be above 0"),
        bad(lambda c: {"params": {"threshold": 0.1}}, "params must be an S2OParams, got dict"),
        bad(lambda c: {"params": S2OParams(threshold=(0.1, 0.2))}, "threshold lists 2 heads, the query has 4"),
        bad(lambda c: {"prompt_lens": [9]}, "prompt_lens must have one entry for each of the 2 sequences, got 1"),
        bad(lambda c: {"prompt_lens": [9, -1]}, "prompt_lens must be whole numbers from 0 on, got [9, -1]"),
        bad(lambda c: {"prompt_lens": [9, None]}, "prompt_lens must be whole numbers from 0 on, got [9, None]"),
        bad(lambda c: {"seq_lens": c.seq_lens.long()}, "seq_lens must be int32"),
        bad(lambda c: {"block_table": c.block_table[:1]}, "block_table must be int32 [2, max_blocks]"),
        bad(lambda c: {"query_start_loc": c.query_start_loc + 1}, "must ascend from 0"),
        bad(lambda c: {"seq_lens": c.seq_lens - 30}, "the length must lie between"),
        bad(lambda c: {"seq_lens": c.seq_lens + 999}, "the length must lie between"),
        bad(lambda c: {"out": c.query.half()}, "out must be"),
        bad(
            lambda c: {"params": DENSE.model_copy(update={"segment_len": 48})},
            "segment_len=48 must be a multiple of tile_size=32",
        ),
        bad(lambda c: {"out": strided(c.query)}, "out's last dimension must be dense"),
    ],
)
def test_bad_arguments(change, message):
    case = make_case([40, 50], [60, 50])
    with pytest.raises(ValueError, match="prefill_attention: ") as caught:
        prefill_attention(**({"params": DENSE} | case.arguments | change(case)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strides_that_32_bits_do_not_hold():
    case = make_case([40], [60])
    arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    arguments["key_cache"] = torch.empty_strided(case.key_cache.shape, (2048, 2**28, 64, 1), device="meta")
    with pytest.raises(ValueError, match="key_cache's strides reach 4026531840 elements within a block"):
        prefill_attention(**arguments, params=DENSE)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on the GPU, where bfloat16 is tested")
def test_bfloat16_is_not_interpreted():
    case = make_case([40], [60], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="knows no bfloat16"):
        prefill_attention(**case.arguments, params=DENSE, implementation="triton")
