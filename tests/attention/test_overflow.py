"""Offsets that 32 bits do not hold: in each tensor, by each of its strides.

Memory that is not touched costs none on a CPU, so that tensors may have more than 2^31 elements; on a GPU it must be
there.
"""

import pytest
import torch
from cases import DEVICE, by_rows, make_case

from vllm_s2o import S2OParams, arguments, attention, prefill_attention

IMPLEMENTATIONS = ["naive", "triton", "cuda"] if DEVICE.type == "cuda" else ["naive", "cpu", "triton"]
# On a GPU, what the kernels for Hopper take.
TILE, DTYPE = (64, torch.float16) if DEVICE.type == "cuda" else (16, torch.float16)
PARAMS = S2OParams(dense_tail=0, threshold=0, segment_len=TILE, tile_size=TILE, key_block=32)
LENGTHS = ([TILE + 5, 7], [2 * TILE + 3, TILE + 9])


def spread(tensor: torch.Tensor, **strides: int) -> torch.Tensor:
    """The same values, in a tensor of more memory with other strides by dimension: d0, d1, ..."""
    wanted = [strides.get(f"d{dim}", stride) for dim, stride in enumerate(tensor.stride())]
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, wanted, strict=True))
    memory = torch.empty(last + 1, dtype=tensor.dtype, device=tensor.device)
    view = memory.as_strided(tensor.shape, wanted)
    view.copy_(tensor)
    return view


def far(tensor: torch.Tensor, dim: int) -> dict[str, int]:
    """A stride, a multiple of 16 that fits 32 bits, by which the last index of a dimension does not."""
    return {f"d{dim}": (2**31 // (tensor.shape[dim] - 1) + 4096) // 16 * 16}


def check(case, implementation, **changes) -> torch.Tensor:
    out = prefill_attention(**(case.arguments | changes), params=PARAMS, implementation=implementation)
    assert (out.double() - by_rows(case)).abs().max() <= 8e-3
    return out


@pytest.fixture(scope="module")
def case():
    # Enough heads that strides between them stay far below 2^31, and few, for Triton's interpreter.
    return make_case(*LENGTHS, num_heads=6, num_kv_heads=3, head_size=64, dtype=DTYPE)


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
@pytest.mark.parametrize("dim", [0, 2], ids=["blocks", "heads"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_caches(case, implementation, dim, name):
    """Blocks of both caches apart: the kernels for Hopper take only caches with the same strides."""
    names = ["key_cache", "value_cache"] if dim == 0 and name == "value_cache" else [name]
    check(case, implementation, **{n: spread(getattr(case, n), **far(case.key_cache, dim)) for n in names})


@pytest.mark.parametrize("dim", [0, 1], ids=["tokens", "heads"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries(case, implementation, dim):
    """As far as rows of a batch of a million tokens lie."""
    query = spread(case.query, **far(case.query, dim))
    assert dim or query.stride(0) > arguments.MAX_ROW_STRIDE
    check(case, implementation, query=query)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_of_the_output(case, implementation):
    assert check(case, implementation, out=spread(case.query, **far(case.query, 1))).stride(1) > 2**28


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_far_into_a_batch(implementation):
    """Of many tokens, nearly all belong to a sequence that is not attended here, as dense rows of a step do not."""
    case = make_case(*LENGTHS, num_heads=2, num_kv_heads=1, head_size=64, dtype=DTYPE)
    tokens = 2**31 // 128 + 10_000
    rows, few = tokens + len(case.query), len(case.query)
    query = torch.empty(rows, 2, 64, dtype=DTYPE, device=DEVICE)
    out = torch.empty_like(query)
    query[-few:] = case.query
    table = torch.cat([case.block_table[:1], case.block_table])
    plan = attention.plan_step([tokens, *case.query_lens], [tokens, *case.lens], PARAMS, 2, seqs=[1, 2])
    attention.run(
        query, case.key_cache, case.value_cache, table, attention.to_device(plan, DEVICE), PARAMS, case.scale, out,
        implementation=implementation,
    )  # fmt: skip
    assert (out[-few:].double() - by_rows(case)).abs().max() <= 8e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_the_block_table(case, implementation):
    lengths = [1] * 8
    many = make_case(lengths, [20] * 8, num_heads=2, num_kv_heads=1, head_size=64, dtype=DTYPE)
    check(many, implementation, block_table=spread(many.block_table, **far(many.block_table, 0)))


def on_no_device(case, **changes):
    tensors = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    return tensors | {"params": PARAMS} | changes


def test_what_the_kernels_do_not_count_is_refused(case):
    """In one sentence each, before anything is read."""
    blocks = torch.empty_strided((2**28, 16, 3, 64), (64, 0, 0, 1), dtype=DTYPE, device="meta")
    with pytest.raises(ValueError, match="the caches hold 4294967296 tokens, supported are 2"):
        prefill_attention(**on_no_device(case, key_cache=blocks, value_cache=blocks))
    out = torch.empty_strided(case.query.shape, (2**24, 64, 1), dtype=DTYPE, device="meta")
    with pytest.raises(ValueError, match="out's rows lie 16777216 elements apart"):
        prefill_attention(**on_no_device(case, out=out))
    table = torch.zeros(1, 2**20 + 1, dtype=torch.int32, device=DEVICE)
    long = {
        "query": case.query[:1], "block_table": table,
        "query_start_loc": torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        "seq_lens": torch.tensor([2**24], dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    with pytest.raises(ValueError, match="sequence 0 has length 16777216, supported are 16777215"):
        prefill_attention(**(case.arguments | long), params=PARAMS)
    # With more than 128 rankings their places exceed 32 bits before a sequence's length does.
    shape = case.key_cache.shape
    many = long | {
        "query": case.query[:1, :1].expand(-1, 260, -1), "seq_lens": torch.full_like(long["seq_lens"], 2**24 - 1),
        **{name: case.arguments[name][:, :, :1].expand(-1, -1, 130, -1) for name in ("key_cache", "value_cache")},
    }  # fmt: skip
    assert many["key_cache"].shape == (*shape[:2], 130, shape[3])
    with pytest.raises(ValueError, match="has length 16777215, supported are 8259552 with 260 rankings of each"):
        prefill_attention(**(case.arguments | many), params=PARAMS)
    with pytest.raises(ValueError, match="supported are 16519104 with 130 rankings"):
        prefill_attention(**(case.arguments | many), params=PARAMS.model_copy(update={"ranking": "kv_head"}))


def test_places_of_rankings_fit_32_bits():
    assert arguments.longest_ranked(8) == arguments.longest_ranked(128) == arguments.MAX_SEQ_LEN
    assert arguments.longest_ranked(129) * 129 < 2**31 <= (arguments.longest_ranked(129) + 1) * 129


def test_a_tiles_pairs_fit_32_bits():
    assert 128 * arguments.MAX_SEQ_LEN < 2**31
    assert 127 * arguments.MAX_ROW_STRIDE + 256 < 2**31
