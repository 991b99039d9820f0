"""Numbers that are NaN, infinite or huge, and inputs at the edge: what they may reach, and what they must not.

What holds, with rows counted as (token, query head):

- A row that dense attention leaves finite is finite here, and right: dense attention means that a row sees the keys
  up to its own, and nothing else (`cases.by_rows`).
- NaN in a query is in its row alone. NaN in a key or a value is in the rows that visit it: all later ones of its
  segment, and later segments' as far as they get. Of a value, only in its own element.
- What is not finite takes no part in a ranking: the other queries and keys of a segment decide.
- Other sequences, and heads of other KV heads, keep their bits.
"""

import math

import pytest
import torch
from cases import DEVICE, by_rows, make_case, place_of

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import naive

IMPLEMENTATIONS = ["naive", "triton", "cuda"] if DEVICE.type == "cuda" else ["naive", "cpu", "triton"]
NAN, INF = math.nan, math.inf
BAD = {"nan": NAN, "inf": INF, "-inf": -INF}

# Whole tiles of 64 rows, of which the kernels for Hopper take bfloat16 and float16.
RULES = dict(segment_len=128, tile_size=64, key_block=32, stop_interval=1)
DENSE, SPARSE = S2OParams(threshold=0, **RULES), S2OParams(threshold=0.05, **RULES)
LENGTHS = dict(query_lens=[300, 90], seq_lens=[300, 190])
"""Three segments of one sequence, and two of another's last chunk."""

SEQ, TOKEN = 0, 150
"""Where the bad number stands: in the second segment, in the middle of its first tile."""
CHUNK = 16  # of page and sample


def dtypes():
    return [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=dtypes(), ids=lambda dtype: str(dtype).removeprefix("torch."))
def case(request):
    return make_case(**LENGTHS, num_heads=4, num_kv_heads=2, head_size=64, dtype=request.param)


def attend(case, params, implementation):
    return prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)


def bar(case) -> float:
    """Of one number of the case's type, and of the weights that are rounded to it."""
    return {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[case.query.dtype]


def assert_right(case, out, exact):
    """Finite and right wherever dense attention is finite."""
    known = exact.isfinite()
    assert out[known].isfinite().all()
    assert (out.double() - exact)[known].abs().max() <= bar(case)


def elsewhere(case, kv_head) -> torch.Tensor:
    """[tokens, heads] bool: rows of other sequences and of other KV heads."""
    rows = torch.ones(case.query.shape[:2], dtype=torch.bool, device=DEVICE)
    starts, group = case.query_start_loc.tolist(), case.query.shape[1] // case.key_cache.shape[2]
    rows[starts[SEQ] : starts[SEQ + 1], kv_head * group : (kv_head + 1) * group] = False
    return rows


@pytest.mark.parametrize("params", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestOneBadNumber:
    def test_in_a_query(self, case, implementation, bad, params):
        clean, _ = attend(case, params, implementation)
        case.query[TOKEN, 1, 5] = BAD[bad]
        out, stats = attend(case, params, implementation)
        spoiled = ~out.isfinite().all(-1)
        mine = torch.zeros_like(spoiled)
        mine[TOKEN, 1] = True
        assert not (spoiled & ~mine).any()
        if bad == "nan":
            assert out[TOKEN, 1].isnan().all()
        others = elsewhere(case, 0)
        assert torch.equal(out[others], clean[others])
        if params is DENSE:
            assert_right(case, out, by_rows(case))
            assert torch.equal(stats.visited_pairs, stats.causal_pairs)

    def test_in_a_key(self, case, implementation, bad, params):
        clean, _ = attend(case, params, implementation)
        case.key_cache[*place_of(case, SEQ, TOKEN), 0, 5] = BAD[bad]
        out, _ = attend(case, params, implementation)
        exact = by_rows(case)
        assert out[exact.isfinite()].isfinite().all()
        if bad == "nan":  # rows that must visit it: the later ones of its segment
            assert out[TOKEN:256, :2].isnan().all()
        others = elsewhere(case, 0)
        others[:128] = True  # an earlier segment
        assert torch.equal(out[others], clean[others])
        if params is DENSE:
            assert_right(case, out, exact)
        else:  # earlier rows of its segment: ranked and stopped as before, in a tile that may be computed again
            assert (out - clean)[128:TOKEN].abs().max() <= bar(case)

    def test_in_a_value(self, case, implementation, bad, params):
        clean, before = attend(case, params, implementation)
        case.value_cache[*place_of(case, SEQ, TOKEN), 0, 5] = BAD[bad]
        out, stats = attend(case, params, implementation)
        assert not out[TOKEN:256, :2, 5].isfinite().any(), "the later rows of its segment visit it"
        spoiled = ~out.isfinite()
        spoiled[TOKEN:300, :2, 5] = False
        assert not spoiled.any()
        others = elsewhere(case, 0)
        others[:128] = True
        assert torch.equal(out[others], clean[others])
        assert torch.equal(stats.visited_pairs, before.visited_pairs), "values have no say in stops"
        kept = out.isfinite()
        assert (out - clean)[kept].abs().max() <= bar(case)
        if params is DENSE:
            assert_right(case, out, by_rows(case))
