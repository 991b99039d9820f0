"""Caches in fp8: the same as caches that hold what fp8 numbers stand for."""

from dataclasses import replace

import pytest
import torch
from cases import DEVICE, make_case

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import naive

IMPLEMENTATIONS = ["naive", *(["triton", "cuda"] if DEVICE.type == "cuda" else ["cpu", "triton"])]
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
EXACT = DEVICE.type == "cpu"
SPARSE = S2OParams(dense_tail=0, threshold=0.05, segment_len=64, tile_size=32, key_block=16, num_classes=32)
LENGTHS = ([70, 200, 1], [300, 200, 90])


def quantised(case, key_scale: float, value_scale: float, dtype=DTYPE):
    """The case with caches in fp8, and the one with caches of what these stand for, all in `dtype`."""
    caches = [(cache / factor).to(torch.float8_e4m3fn) for cache, factor in
              ((case.key_cache, key_scale), (case.value_cache, value_scale))]  # fmt: skip
    plain = [cache.to(dtype) * factor for cache, factor in zip(caches, (key_scale, value_scale), strict=True)]
    return (
        replace(case, key_cache=caches[0], value_cache=caches[1]),
        replace(case, query=case.query.to(dtype), key_cache=plain[0], value_cache=plain[1]),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_like_caches_of_what_they_stand_for(implementation):
    """Factors that are powers of two: nothing is rounded that would not be."""
    fp8, plain = quantised(make_case(*LENGTHS, num_heads=4, num_kv_heads=2, head_size=64, dtype=DTYPE), 0.5, 4.0)
    given = dict(params=SPARSE, implementation=implementation, return_stats=True)
    ours, stats = prefill_attention(**fp8.arguments, **given, key_scale=0.5, value_scale=4.0)
    theirs, expected = prefill_attention(**plain.arguments, **given)
    assert torch.equal(stats.visited_pairs, expected.visited_pairs)
    assert (stats.visited_pairs < stats.causal_pairs).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if EXACT else 1e-2, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threshold_zero_is_dense(implementation):
    # These factors' products have more digits than 16 bits: what they stand for is known in fp32 only.
    case = make_case(*LENGTHS, num_heads=4, num_kv_heads=1, head_size=96, dtype=DTYPE)
    fp8, plain = quantised(case, 0.013, 0.3, torch.float32)
    params = SPARSE.model_copy(update={"threshold": 0.0})
    ours = prefill_attention(
        **fp8.arguments, params=params, implementation=implementation, key_scale=0.013, value_scale=0.3
    )
    exact = naive.dense_attention(**plain.arguments)
    torch.testing.assert_close(ours.float(), exact, rtol=1e-4 if EXACT else 2e-2, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_in_fp8_too(implementation):
    """As vLLM hands them over beside such a cache."""
    fp8, _ = quantised(make_case(*LENGTHS, num_heads=4, num_kv_heads=2, head_size=64, dtype=DTYPE), 0.5, 4.0)
    query = (fp8.query / 0.25).to(torch.float8_e4m3fn)
    plan = attention.to_device(attention.plan_step(fp8.query_lens, fp8.seq_lens.tolist(), SPARSE, 4), DEVICE)
    outs = []
    for given, factor in ((query, 0.25), (query.to(DTYPE) * 0.25, 1.0)):
        out = torch.zeros_like(fp8.query)
        visited = attention.run(
            given, fp8.key_cache, fp8.value_cache, fp8.block_table, plan, SPARSE, fp8.scale * 0.5 * factor, out,
            value_scale=4.0, implementation=implementation,
        )  # fmt: skip
        outs.append((out, visited))
    (ours, visited), (theirs, expected) = outs
    if implementation in ("naive", "cpu"):  # the kernels take the mean of fp8 queries in bfloat16
        assert torch.equal(visited, expected)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()


def test_bad_factors_and_types():
    case = make_case([8], [8], dtype=DTYPE)
    with pytest.raises(ValueError, match=r"value_scale must be above 0, got 0$"):
        prefill_attention(**case.arguments, params=SPARSE, value_scale=0)
    with pytest.raises(ValueError, match=r"value_scale is for fp8 caches, got 0.5 beside torch"):
        prefill_attention(**case.arguments, params=SPARSE, value_scale=0.5)
    with pytest.raises(ValueError, match="or both caches be float8_e4m3fn, got"):
        mixed = replace(case, key_cache=case.key_cache.to(torch.float8_e4m3fn))
        prefill_attention(**mixed.arguments, params=SPARSE)
