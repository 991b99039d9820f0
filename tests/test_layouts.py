"""Keys and values are found where vLLM's own operators put them, in every layout of its cache."""

from types import SimpleNamespace

import pytest
import torch
from cases import Case, error_bar
from vllm import _custom_ops as ops
from vllm.platforms import CpuArchEnum, current_platform

from vllm_s2o import S2OParams, prefill_attention
from vllm_s2o.compat import caches

on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="this build of vLLM has no CPU operators")

PAGE = 128
NUM_KV_HEADS = 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKED = [
    *(("vec", dtype, size) for dtype in DTYPES for size in (64, 128)),
    *(("vec16", dtype, size) for dtype in DTYPES for size in (64, 80, 128)),
    *(("amx", dtype, size) for dtype in ("bf16", "fp16") for size in (64, 128)),
]
every_layout = pytest.mark.parametrize(("isa", "dtype", "head_size"), PACKED)


def pack(isa: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, blocks: int, page=PAGE) -> torch.Tensor:
    """A cache that vLLM's operator wrote, all else in it NaN: [blocks, kv_heads, page, 2 * head_size]."""
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    _, heads, size = key.shape
    cache = torch.full((blocks, heads, page, 2 * size), torch.nan, dtype=key.dtype)
    halves = cache.view(blocks, heads, 2 * page, size).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)
    return cache


def tokens(count: int, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(head_size + count)
    key, value = torch.randn(2, count, NUM_KV_HEADS, head_size, generator=generator).to(dtype)
    return key, value


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def stand_in(isa: str) -> SimpleNamespace:
    return SimpleNamespace(isa=isa)


@on_cpu
@every_layout
def test_each_token_is_found_at_its_slot(isa, dtype, head_size):
    blocks = 5
    key, value = tokens(300, head_size, DTYPES[dtype])
    slots = shuffled(blocks * PAGE)[:300]
    cache = pack(isa, key, value, slots, blocks)
    table = shuffled(blocks).int()[None]
    keys, values, found = caches.views(stand_in(isa), None, cache, table)
    assert keys.shape == values.shape == (blocks, PAGE, NUM_KV_HEADS, head_size)
    assert found.shape == table.shape
    assert found.dtype == torch.int32
    # The table says where block b went.
    place = torch.empty(blocks, dtype=torch.long)
    place[table[0].long()] = found[0].long()
    where = place[slots // PAGE], slots % PAGE
    assert torch.equal(keys[where], key)
    assert torch.equal(values[where], value)
    assert keys.isfinite().sum() == values.isfinite().sum() == key.numel(), "a slot that was not written holds a number"


@on_cpu
@pytest.mark.parametrize(
    ("isa", "dtype", "page"), [("vec", "fp32", 32), ("vec16", "bf16", 16), ("vec16", "fp32", 48), ("amx", "bf16", 32)]
)
def test_other_block_sizes(isa, dtype, page):
    """`--block-size` is the user's to choose."""
    key, value = tokens(3 * page, 64, DTYPES[dtype])
    slots = shuffled(3 * page)
    cache = pack(isa, key, value, slots, 3, page)
    keys, values, _ = caches.views(stand_in(isa), None, cache, torch.arange(3, dtype=torch.int32)[None])
    assert torch.equal(keys[slots // page, slots % page], key)
    assert torch.equal(values[slots // page, slots % page], value)


@on_cpu
@pytest.mark.skipif(
    current_platform.get_cpu_architecture() != CpuArchEnum.X86, reason="other processors have layouts of their own"
)
@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_vllm_chooses_is_known(dtype, head_size, page):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(DTYPES[dtype], page, head_size, "auto")
    assert isa in caches.CPU_LAYOUTS
    assert isa != "amx" or DTYPES[dtype].itemsize == 2


@on_cpu
@every_layout
def test_attention_on_a_packed_cache_is_dense_at_threshold_zero(isa, dtype, head_size):
    """With NaN in all slots that hold no token of the two sequences, and garbage in the block table."""
    seq_lens, query_lens, blocks = [300, 130], [170, 130], 8
    key, value = tokens(sum(seq_lens), head_size, DTYPES[dtype])
    pages = shuffled(blocks).int()
    table = torch.tensor([[*pages[:3], 2**30], [*pages[3:5], -1, blocks]], dtype=torch.int32)
    positions = [torch.arange(length) for length in seq_lens]
    slots = torch.cat([table[seq, at // PAGE] * PAGE + at % PAGE for seq, at in enumerate(positions)])
    cache = pack(isa, key, value, slots, blocks)
    keys, values, found = caches.views(stand_in(isa), None, cache, table)
    case = Case(
        torch.randn(sum(query_lens), 4, head_size, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype]),
        keys, values, found, torch.tensor([0, 170, 300], dtype=torch.int32), torch.tensor(seq_lens, dtype=torch.int32),
        head_size**-0.5, query_lens, seq_lens,
    )  # fmt: skip
    # What is expected comes from the tokens as they were written.
    flat = case.arguments | {
        "key_cache": key[:, None], "value_cache": value[:, None],
        "block_table": torch.stack([torch.arange(300), torch.arange(300, 600).clamp(max=429)]).int(),
    }  # fmt: skip
    exact, bar = error_bar(Case(**flat, query_lens=query_lens, lens=seq_lens))
    params = S2OParams(threshold=0, segment_len=64, tile_size=32, key_block=16)
    out = prefill_attention(**case.arguments, params=params)
    assert (out.double() - exact).abs().max() <= bar


@on_cpu
def test_garbage_beyond_a_sequence_leaves_amx_pages_as_they_are():
    """What a table holds behind a sequence's end may be no block at all."""
    key, value = tokens(2 * PAGE, 64, torch.bfloat16)
    cache = pack("amx", key, value, torch.arange(2 * PAGE), 2)
    clean = torch.tensor([[1, 0, 0]], dtype=torch.int32)
    garbage = torch.tensor([[1, 0, 2**31 - 1], [1, -(2**31), 7]], dtype=torch.int32)
    keys, values, found = caches.views(stand_in("amx"), None, cache, garbage)
    want_keys, want_values, want = caches.views(stand_in("amx"), None, cache, clean)
    assert ((found >= 0) & (found < len(keys))).all()
    assert torch.equal(keys[found[0, :2].long()], want_keys[want[0, :2].long()])
    assert torch.equal(values[found[0, :2].long()], want_values[want[0, :2].long()])
    assert torch.equal(keys[found[1, :1].long()], want_keys[want[0, :1].long()])


def test_only_the_pages_in_use_are_unpacked_for_amx():
    cache = torch.zeros(1000, NUM_KV_HEADS, 32, 2 * 64, dtype=torch.bfloat16)
    table = torch.tensor([[7, 900, 7], [30, 7, 900]], dtype=torch.int32)
    keys, _, found = caches.views(stand_in("amx"), None, cache, table)
    assert len(keys) == 3
    assert found.tolist() == [[0, 2, 0], [1, 0, 2]]


@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_plain_cpu_layouts_are_views(isa):
    cache = torch.zeros(3, NUM_KV_HEADS, 32, 2 * 64)
    keys, values, _ = caches.views(stand_in(isa), None, cache, torch.zeros(1, 1, dtype=torch.int32))
    storage = cache.untyped_storage().data_ptr()
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() == storage


def test_the_layer_names_the_layout_before_the_implementation_does():
    """vLLM 0.32 notes it on the layer, 0.25.1 on the implementation."""
    cache = torch.randn(2, NUM_KV_HEADS, 32, 2 * 64).bfloat16()
    table = torch.arange(2, dtype=torch.int32)[None]
    vec, _, _ = caches.views(stand_in("vec"), None, cache, table)
    amx, _, _ = caches.views(stand_in("amx"), None, cache, table)
    assert not torch.equal(vec, amx)
    assert torch.equal(caches.views(stand_in("amx"), stand_in("vec"), cache, table)[0], amx)
    assert torch.equal(caches.views(SimpleNamespace(), stand_in("amx"), cache, table)[0], amx)


# -- CUDA -------------------------------------------------------------------------------------------------------------

BLOCKS, CUDA_PAGE, HEADS, SIZE = 5, 16, 3, 8
NUMBERS = torch.arange(BLOCKS * 2 * CUDA_PAGE * HEADS * SIZE)


def position(block, token, head, dim, *, strides, value, offset):
    """Where an element lies, in elements from the start of the cache."""
    return sum(i * stride for i, stride in zip((block, token, head, dim), strides, strict=True)) + value * offset


@pytest.mark.parametrize(
    ("cache", "strides", "offset"),
    [
        pytest.param(
            NUMBERS.view(BLOCKS, 2, CUDA_PAGE, HEADS, SIZE),
            (2 * CUDA_PAGE * HEADS * SIZE, HEADS * SIZE, SIZE, 1),
            CUDA_PAGE * HEADS * SIZE,
            id="0.25.1",
        ),
        pytest.param(
            NUMBERS.view(BLOCKS, 2, HEADS, CUDA_PAGE, SIZE).transpose(2, 3),
            (2 * CUDA_PAGE * HEADS * SIZE, SIZE, CUDA_PAGE * SIZE, 1),
            CUDA_PAGE * HEADS * SIZE,
            id="0.25.1-head-major",
        ),
        pytest.param(
            NUMBERS.view(BLOCKS, CUDA_PAGE, HEADS, 2 * SIZE).permute(0, 2, 1, 3),
            (CUDA_PAGE * HEADS * 2 * SIZE, HEADS * 2 * SIZE, 2 * SIZE, 1),
            SIZE,
            id="0.32",
        ),
        pytest.param(
            NUMBERS.view(BLOCKS, HEADS, CUDA_PAGE, 2 * SIZE),
            (CUDA_PAGE * HEADS * 2 * SIZE, 2 * SIZE, CUDA_PAGE * 2 * SIZE, 1),
            SIZE,
            id="0.32-head-major",
        ),
    ],
)
def test_cuda_layouts(cache, strides, offset):
    """Each element of the cache holds its own position in memory."""
    keys, values = caches.cuda_caches(cache, SIZE)
    for value, view in enumerate((keys, values)):
        assert view.shape == (BLOCKS, CUDA_PAGE, HEADS, SIZE)
        assert view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        for at in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (4, 15, 2, 7), (2, 9, 1, 3)):
            assert view[at] == position(*at, strides=strides, value=value, offset=offset)
    assert torch.equal(torch.cat([keys.flatten(), values.flatten()]).sort().values, NUMBERS)
