"""Gluon, for Hopper GPUs: the two-pass attention of `prefill.py`, with warps that only gather.

A program owns a tile of query rows of one head, as there, and computes the same in the same order. What differs
is who does what and when:

    gather     4 warps             slots -> rows of K and V, copied asynchronously into a ring of buffers
    visit      4 warps per 64 rows products on the matrix units; those of one block run under the softmax of the next

A buffer's two barriers say that it is *full* (the copies have landed) and *free* (all products have read it). The
halves of a tile run apart, so that one's softmax fills the gaps of the other's products; they meet where the tile is
judged.
When it stops, the gathering warps are blocks ahead, and what they have fetched is lost. The halves leave the number of
a block that is not to be fetched any more, one ring after their last: all gathering warps compare with it, and before
that block each of them has waited for a buffer that was freed after the number was left. So they stop together; a plain
flag could be seen by some of them a block earlier than by the others, which would wait for them forever.
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import tuned
from .prefill import LOG2E

# Triton 3.9 has another name for it.
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

GATHER_THREADS = gl.constexpr(128)
ROWS = gl.constexpr(64)
"""Query rows of a warp group."""


@gluon.jit
def _copy_block(
    slot, i, keys, values, d, buffers, barriers, stride_block, stride_token,
    PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying the rows at these slots into the ring, as block i."""
    k_ring, v_ring, _ = buffers
    k_full, k_free, v_full, v_free = barriers
    # In 16-byte steps a row's place fits 32 bits, which spares registers.
    at = slot // PAGE * (stride_block // 8) + slot % PAGE * (stride_token // 8)
    at = (at.to(gl.uint32, bitcast=True).to(gl.int64) * 8)[:, None] + d
    stage = i % STAGES
    phase = (i // STAGES) & 1 ^ 1
    mbarrier.wait(k_free.index(stage), phase)
    copy_rows(k_ring.index(stage), keys + at)
    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
    mbarrier.wait(v_free.index(stage), phase)
    copy_rows(v_ring.index(stage), values + at)
    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def _gather(
    keys, values, table, ranking, buffers, barriers, stride_block, stride_token, history, num_inside, end, limit,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Rows of the segment, then of its ranked history. Slots are read a block ahead: rows and the slots that name them
    are loads that wait for each other."""
    threads: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    end_block = buffers[2]

    position = gl.minimum(history + row, end - 1)
    page = gl.load(table + position // PAGE)
    for i in range(num_inside):
        slot = page * PAGE + position % PAGE
        position = gl.minimum(history + (i + 1) * BLOCK + row, end - 1)
        page = gl.load(table + position // PAGE)
        _copy_block(slot, i, keys, values, d, buffers, barriers, stride_block, stride_token, PAGE, STAGES)

    i = num_inside
    if limit > 0:
        slot = gl.load(ranking + gl.minimum(row, limit - 1))
        seen = 0
        going = seen < limit
        while going:
            ahead = gl.load(ranking + gl.minimum(seen + BLOCK + row, limit - 1))
            _copy_block(slot, i, keys, values, d, buffers, barriers, stride_block, stride_token, PAGE, STAGES)
            slot = ahead
            seen += BLOCK
            i += 1
            going = (seen < limit) & (i < end_block.load(one).item())
    # The halves begin a block before they know that there is none: its keys are whatever the buffer holds.
    if i < end_block.load(one).item():
        k_full, k_free, _, _ = barriers
        mbarrier.wait(k_free.index(i % STAGES), (i // STAGES) & 1 ^ 1)
        async_copy.mbarrier_arrive(k_full.index(i % STAGES), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _scores(q, k_ring, k_full, i, MMA: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of a block's keys with the tile's queries."""
    stage = i % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    fence_async_shared()
    zero = gl.zeros([ROWS, BLOCK], gl.float32, MMA)
    return warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _weighted(p, acc, v_ring, v_full, i, STAGES: gl.constexpr):
    """Start adding a block's values, weighted, to the accumulator."""
    stage = i % STAGES
    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
    fence_async_shared()
    return warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rescale(acc, keep):
    return acc * gl.convert_layout(keep, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _softmax(s, m, l, scale):
    """One block of the online softmax, in base 2: weights, and what the rows keep of what they had."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = _exp2(s * scale - origin[:, None])
    keep = _exp2(m - origin)
    return p, m_new, l * keep + gl.sum(p, 1), keep


@gluon.jit
def _pack(w, dtype: gl.constexpr):
    """Weights as a product takes them, two neighbours of a row in a word. Loops carry words: halves of words would be
    taken apart and joined again at each turn."""
    first, second = w.reshape([ROWS, w.shape[1] // 2, 2]).split()
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(words, dtype: gl.constexpr, P: gl.constexpr):
    """The operand of a product from what `_pack` made."""
    asm: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    if dtype == gl.bfloat16:
        p = gl.inline_asm_elementwise(asm, "=h,=h,r", [words], dtype=(gl.bfloat16,) * 2, is_pure=True, pack=1)
    else:
        p = gl.inline_asm_elementwise(asm, "=h,=h,r", [words], dtype=(gl.float16,) * 2, is_pure=True, pack=1)
    return gl.convert_layout(gl.join(p[0], p[1]).reshape([ROWS, words.shape[1] * 2]), P, assert_trivial=True)


@gluon.jit
def _begin(
    q, p, acc, i, buffers, barriers, MMA: gl.constexpr, P: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    """Start the products that block i begins with: its scores, and the weighted values of block i - 1."""
    k_ring, v_ring, _ = buffers
    k_full, _, v_full, _ = barriers
    s = _scores(q, k_ring, k_full, i, MMA, BLOCK, STAGES)
    return s, _weighted(_unpack(p, q.dtype, P), acc, v_ring, v_full, i - 1, STAGES)


@gluon.jit
def _finish(
    s, before, m, l, i, scale, column_limit, barriers,
    DTYPE: gl.constexpr, MMA: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The softmax of block i, under the products that were started."""
    _, k_free, _, v_free = barriers
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_free.index(i % STAGES), count=1)
    if MASKED:
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, MMA))
        s = gl.where(column[None, :] <= column_limit[:, None], s, float("-inf"))
    w, m, l, keep = _softmax(s, m, l, scale)
    acc = warpgroup_mma_wait(0, [before])
    mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)
    return _pack(w, DTYPE), _rescale(acc, keep), m, l


@gluon.jit
def _judge(gain, verdict, met, round, half, HALVES: gl.constexpr, WORST_ROW: gl.constexpr):
    """The tile's gain, from those of its halves: a half leaves its own and waits for the other's."""
    mine = gl.max(gain, 0) if WORST_ROW else gl.sum(gain, 0)
    if HALVES == 1:
        return mine
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    side = (round & 1) * 2
    verdict.index(side + half).store(gl.full([1], mine, gl.float32, one))
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, round & 1)
    first = verdict.index(side).load(one).item()
    second = verdict.index(side + 1).load(one).item()
    return gl.maximum(first, second) if WORST_ROW else first + second


@gluon.jit
def _visit(
    half, queries, out, stride_o_token, visited, query_pos, rows, history, num_inside, limit, threshold, scale,
    buffers, barriers, verdict, met,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    UNIT: gl.constexpr, INTERVAL: gl.constexpr, WORST_ROW: gl.constexpr,
):  # fmt: skip
    """Both passes for one half of a tile."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    k_ring, v_ring, end_block = buffers
    k_full, k_free, v_full, v_free = barriers
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q = queries.index(half)
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    inside = query_pos - history + row  # place in the segment
    acc = gl.zeros([ROWS, D], gl.float32, ACC)
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, MMA))

    # Pass 1: the segment's own keys, causal. Nothing precedes the first block.
    scores = warpgroup_mma_wait(0, [_scores(q, k_ring, k_full, 0, MMA, BLOCK, STAGES)])
    mbarrier.arrive(k_free.index(0), count=1)
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, MMA))
    scores = gl.where(column[None, :] <= inside[:, None], scores, float("-inf"))
    w, m, l, _kept = _softmax(scores, m, l, scale)
    p = _pack(w, q.dtype)
    for i in range(1, num_inside):
        s, before = _begin(q, p, acc, i, buffers, barriers, MMA, P, BLOCK, STAGES)
        p, acc, m, l = _finish(
            s, before, m, l, i, scale, inside - i * BLOCK, barriers, q.dtype, MMA, BLOCK, STAGES, MASKED=True
        )

    # Pass 2: the history, most important keys first, until the tile gains nothing more. The tile is judged under the
    # products that the next block begins with; when it stops, or no whole block is left, these scores are not used.
    PER_TEST: gl.constexpr = INTERVAL * UNIT // BLOCK
    num_whole = limit // BLOCK
    i = num_inside
    done = 0
    gain = gl.full([ROWS], float("inf"), gl.float32, gl.SliceLayout(1, MMA))
    gains = True
    going = True
    while going:
        s, before = _begin(q, p, acc, i, buffers, barriers, MMA, P, BLOCK, STAGES)
        judged = _judge(gain, verdict, met, (done + PER_TEST - 1) // PER_TEST, half, HALVES, WORST_ROW)
        if not WORST_ROW:
            judged = judged / rows
        # The last whole blocks may be too few for a test: what is left belongs to them.
        gains = (judged >= threshold) | (done % PER_TEST > 0)
        going = gains & (done < num_whole)
        if going:
            m_before, l_before = m, l
            p, acc, m, l = _finish(
                s, before, m, l, i, scale, inside, barriers, q.dtype, MMA, BLOCK, STAGES, MASKED=False
            )
            count = gl.minimum(PER_TEST, num_whole - done)
            for j in range(1, count):
                s, before = _begin(q, p, acc, i + j, buffers, barriers, MMA, P, BLOCK, STAGES)
                p, acc, m, l = _finish(
                    s, before, m, l, i + j, scale, inside, barriers, q.dtype, MMA, BLOCK, STAGES, MASKED=False
                )
            i += count
            done += count
            gain = 1 - l_before * _exp2(m_before - m) / l
            gain = gl.where((gain > 0) & (row < rows), gain, 0.0) / INTERVAL
        else:
            end_block.store(gl.full([1], i + STAGES, gl.int32, one))
            _unused, acc = warpgroup_mma_wait(0, [s, before])
            mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)

    seen = done * BLOCK
    if gains & (seen < limit):  # the end of a ranking
        scores = warpgroup_mma_wait(0, [_scores(q, k_ring, k_full, i, MMA, BLOCK, STAGES)])
        scores = gl.where(column[None, :] < limit - seen, scores, float("-inf"))
        w, m, l, keep = _softmax(scores, m, l, scale)
        weights = _unpack(_pack(w, q.dtype), q.dtype, P)
        acc = warpgroup_mma_wait(0, [_weighted(weights, _rescale(acc, keep), v_ring, v_full, i, STAGES)])
        seen = limit
    l = gl.convert_layout(l, gl.SliceLayout(1, ACC))
    result = gl.where(l[:, None] > 0, acc / l[:, None], l[:, None] * 0)
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    d = gl.arange(0, D, gl.SliceLayout(0, ACC))
    at = out + row[:, None] * stride_o_token + d[None, :]
    gl.store(at, result.to(out.dtype.element_ty), mask=(row < rows)[:, None])
    if half == 0:
        gl.store(visited, rows * (query_pos - history + 1) + rows * (rows - 1) // 2 + seen * rows)


@gluon.jit(do_not_specialize=["stride_table"])
def _attend(
    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Visited,
    stride_q_token, stride_q_head, stride_block, stride_token, stride_k_head, stride_v_head,
    stride_o_token, stride_o_head, stride_table, scale,
    PAGE: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
    UNIT: gl.constexpr, INTERVAL: gl.constexpr, WORST_ROW: gl.constexpr, STAGES: gl.constexpr,
    VISIT_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    head, tile = gl.program_id(0), gl.program_id(1)
    kv_head = (head // GROUP).to(gl.int64)
    segment = gl.load(Tiles + tile * 3)
    first = gl.load(Tiles + tile * 3 + 1)
    rows = gl.load(Tiles + tile * 3 + 2)
    seq = gl.load(Segments + segment * 7).to(gl.int64)
    query_row = gl.load(Segments + segment * 7 + 1).to(gl.int64) + first
    query_pos = gl.load(Segments + segment * 7 + 2) + first
    history = gl.load(Segments + segment * 7 + 4)
    limit = gl.load(Segments + segment * 7 + 5)
    ranking = Slots + gl.load(Segments + segment * 7 + 6) + kv_head * history
    threshold = gl.load(Thresholds + head)
    end = query_pos + rows
    num_inside = gl.cdiv(end - history, BLOCK)

    dtype: gl.constexpr = Query.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    ring: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [HALVES, ROWS, D], q_shared)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], ring)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], ring)
    end_block = gl.allocate_shared_memory(gl.int32, [1], plain)
    verdict = gl.allocate_shared_memory(gl.float32, [4, 1], plain)
    met = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(met, count=HALVES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=GATHER_THREADS)
        mbarrier.init(v_full.index(stage), count=GATHER_THREADS)
        mbarrier.init(k_free.index(stage), count=HALVES)
        mbarrier.init(v_free.index(stage), count=HALVES)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    end_block.store(gl.full([1], 2**31 - 1, gl.int32, one))

    load: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, load))
    d = gl.arange(0, D, gl.SliceLayout(0, load))
    for half in gl.static_range(HALVES):
        at = Query + (query_row + half * ROWS + r)[:, None] * stride_q_token + head * stride_q_head + d[None, :]
        queries.index(half).store(gl.load(at, mask=(half * ROWS + r < rows)[:, None], other=0.0))
    fence_async_shared()

    out = Out + query_row * stride_o_token + head * stride_o_head
    visited = Visited + tile * gl.num_programs(0) + head
    buffers = (k_ring, v_ring, end_block)
    barriers = (k_full, k_free, v_full, v_free)
    keys, values = Keys + kv_head * stride_k_head, Values + kv_head * stride_v_head
    table = BlockTable + seq * stride_table
    # Constants stay constants only in a call's own tuples.
    if HALVES == 1:
        gl.warp_specialize(
            [
                (
                    _visit,
                    (
                        0, queries, out, stride_o_token, visited, query_pos, rows, history, num_inside, limit,
                        threshold, scale, buffers, barriers, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL, WORST_ROW,
                    ),
                ),
                (
                    _gather,
                    (
                        keys, values, table, ranking, buffers, barriers, stride_block, stride_token, history,
                        num_inside, end, limit, BLOCK, D, STAGES, PAGE,
                    ),
                ),
            ],
            [4],
            [GATHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _visit,
                    (
                        0, queries, out, stride_o_token, visited, query_pos, rows, history, num_inside, limit,
                        threshold, scale, buffers, barriers, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL, WORST_ROW,
                    ),
                ),
                (
                    _visit,
                    (
                        1, queries, out, stride_o_token, visited, query_pos, rows, history, num_inside, limit,
                        threshold, scale, buffers, barriers, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL, WORST_ROW,
                    ),
                ),
                (
                    _gather,
                    (
                        keys, values, table, ranking, buffers, barriers, stride_block, stride_token, history,
                        num_inside, end, limit, BLOCK, D, STAGES, PAGE,
                    ),
                ),
            ],
            [4, 4],
            [VISIT_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip


class Launch(NamedTuple):
    """How the kernel is built; none of it changes the result but by rounding."""

    block: int = 128
    """Keys of one product: divides the keys between two stop tests."""
    num_stages: int = 2
    visit_registers: int = 216
    gather_registers: int = 72
    """Registers of a thread, by what it does: 65,536 are shared out."""


def unsuitable(query, key_cache, value_cache, ordered: bool, tile_size: int, interval: int) -> str | None:
    """Why this kernel cannot take such a problem and `prefill.attend` must, or None.

    Args:
        interval: keys between two stop tests.
    """
    if torch.cuda.get_device_capability(query.device)[0] != 9:
        return "the GPU is no Hopper"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if query.shape[2] not in (64, 128):
        return f"head size {query.shape[2]}"
    if ordered:
        return "queries in another order"
    if tile_size not in (64, 128):
        return f"tile_size={tile_size}"
    if interval % 32:  # blocks are whole between two tests; smaller ones were never run
        return f"a stop test every {interval} keys"
    strides = (key_cache.stride(), value_cache.stride())
    if strides[0][3] != 1 or strides[0][:2] != strides[1][:2]:
        return "cache strides"
    # Rows are copied in pieces of 16 bytes, which Triton believes of strides that are multiples of 16, and addressed in
    # such steps, of which 32 bits count 64 GiB.
    steps = [s for stride in strides for s in stride[:3]]
    if any(s % 16 for s in steps) or key_cache.data_ptr() % 16 or value_cache.data_ptr() % 16:
        return "cache alignment"
    blocks, block_size = key_cache.shape[:2]
    if ((blocks - 1) * strides[0][0] + (block_size - 1) * strides[0][1]) // 8 >= 2**32:
        return "cache size"
    return None


def attend(
    query, key_cache, value_cache, block_table, segments, tiles, slots, order, thresholds, out,
    *, scale: float, key_block: int, stop_interval: int, stop_rule: str, tile_size: int, options: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """`prefill.attend` for what is not `unsuitable`."""
    num_heads, head_size = query.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    if options is None:  # tuned for tiles of 128 rows
        options = Launch(**tuned.options("hopper", head_size, query.device)) if tile_size == 128 else Launch()
    visited = torch.empty(len(tiles), num_heads, dtype=torch.int32, device=query.device)
    strides = key_cache.stride()
    halves = tile_size // ROWS.value
    _attend[(num_heads, len(tiles))](
        query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, visited,
        query.stride(0), query.stride(1), strides[0], strides[1], strides[2], value_cache.stride(2),
        out.stride(0), out.stride(1), block_table.stride(0), scale * LOG2E,
        PAGE=block_size, GROUP=num_heads // num_kv_heads, D=head_size, HALVES=halves,
        BLOCK=math.gcd(key_block * stop_interval, options.block), UNIT=key_block, INTERVAL=stop_interval,
        WORST_ROW=stop_rule == "worst_row", STAGES=options.num_stages,
        VISIT_REGISTERS=options.visit_registers, GATHER_REGISTERS=options.gather_registers, num_warps=4,
        # The warps of all roles start with equal shares.
        maxnreg=min(65536 // (128 * (halves + 1)) // 8 * 8, 248),
    )  # fmt: skip
    return visited
