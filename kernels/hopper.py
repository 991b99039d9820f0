"""Gluon, for Hopper GPUs: the two-pass attention of `prefill.py`, with warps that only gather.

A tile of query rows of one head is computed as there, and in the same order. What differs is who does what and when.
Each multiprocessor has one program, which takes tile after tile until none is left, the longest first:

    gather     4 warps             tiles; their queries; slots -> rows of K and V, copied into a ring of buffers: in
                                   `hopper_gather.py`
    visit      4 warps per 64 rows products on the matrix units; those of one block run under the softmax of the next

Gathering is a few blocks ahead, and so at the next tile while the last one ends. A buffer's two barriers say that it
is *full* (the copies have landed) and *free* (all products have read it); blocks are numbered through all tiles.
The halves of a tile run apart, so that one's softmax fills the gaps of the other's products; they meet where the tile
is judged, under the products that its next block begins with.

When a tile stops, the gathering warps are blocks ahead. The halves leave the number of the first block that they do
not use. Before block n + STAGES each gathering warp has waited for a buffer that was freed after n was left: so they
leave the tile together, though some may see the number a block earlier than others, and only spare the copy then.
The halves free what was gathered in vain.

A tile whose result is not finite is marked, and computed again by `prefill.attend_marked`.
"""

import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import naive, tuned
from .common import FP8
from .hopper_gather import FIELDS, GATHER_THREADS, ROWS, gather
from .prefill import CALM, LOG2E, attend_marked

_SHARE = gl.constexpr(naive.STEP_SHARE)
_CALM = gl.constexpr(CALM.value)
_WHOLE = gl.constexpr(naive.WHOLE)


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
def _judge(gain, verdict, met, round, half, HALVES: gl.constexpr):
    """The tile's gain, from those of its halves: a half leaves its own and waits for the other's."""
    mine = gl.max(gain, 0)
    if HALVES == 1:
        return mine
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    side = (round & 1) * 2
    verdict.index(side + half).store(gl.full([1], mine, gl.float32, one))
    mbarrier.arrive(met, count=1)
    mbarrier.wait(met, round & 1)
    first = verdict.index(side).load(one).item()
    second = verdict.index(side + 1).load(one).item()
    return gl.maximum(first, second)


@gluon.jit
def _visit(
    half, queries, Out, Report, Thresholds, num_heads, stride_o_token, stride_o_head, scale,
    buffers, barriers, tasks, task_full, task_free, verdict, met,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    UNIT: gl.constexpr, INTERVAL: gl.constexpr,
):  # fmt: skip
    """Both passes for one half of each tile."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    k_ring, v_ring, end_block = buffers
    k_full, k_free, v_full, v_free = barriers
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    PER_TEST: gl.constexpr = INTERVAL * UNIT // BLOCK
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, MMA))

    turn = 0
    base = 0
    round = 0
    mbarrier.wait(task_full.index(0), 0)
    rows = tasks.index(2).load(one).item()
    while rows >= 0:
        fence_async_shared()
        slot = turn & 1
        task = slot * FIELDS
        query_pos = tasks.index(task + 1).load(one).item()
        history = tasks.index(task + 3).load(one).item()
        limit = tasks.index(task + 4).load(one).item()
        work = tasks.index(task + 7).load(one).item()
        head = work % num_heads
        threshold = gl.load(Thresholds + head) * (tasks.index(task + 8).load(one).item() / _WHOLE)
        num_inside = gl.cdiv(query_pos + rows - history, BLOCK)
        q = queries.index(slot * HALVES + half)
        inside = query_pos - history + row  # place in the segment
        acc = gl.zeros([ROWS, D], gl.float32, ACC)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, MMA))
        l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, MMA))

        # Pass 1: the segment's own keys, causal. Nothing precedes the first block.
        scores = warpgroup_mma_wait(0, [_scores(q, k_ring, k_full, base, MMA, BLOCK, STAGES)])
        mbarrier.arrive(k_free.index(base % STAGES), count=1)
        scores = gl.where(column[None, :] <= inside[:, None], scores, float("-inf"))
        w, m, l, _kept = _softmax(scores, m, l, scale)
        p = _pack(w, q.dtype)
        for j in range(1, num_inside):
            s, before = _begin(q, p, acc, base + j, buffers, barriers, MMA, P, BLOCK, STAGES)
            p, acc, m, l = _finish(
                s, before, m, l, base + j, scale, inside - j * BLOCK, barriers, q.dtype, MMA, BLOCK, STAGES,
                MASKED=True,
            )  # fmt: skip

        # Pass 2: the history, most important keys first, until the tile gains nothing more. When it stops, or no whole
        # block is left, the scores that were begun are not used.
        num_whole = limit // BLOCK
        i = base + num_inside
        last = i + gl.cdiv(limit, BLOCK)
        done = 0
        cut = False
        gain = gl.full([ROWS], float("inf"), gl.float32, gl.SliceLayout(1, MMA))
        gains = True
        going = True
        while going:
            s, before = _begin(q, p, acc, i, buffers, barriers, MMA, P, BLOCK, STAGES)
            judged = _judge(gain, verdict, met, round, half, HALVES)
            round += 1
            # The last whole blocks may be too few for a step: what is left belongs to them.
            gains = (judged >= threshold) | cut
            going = gains & (done < num_whole)
            if going:
                m_before, l_before = m, l
                step = PER_TEST * gl.maximum(done // (PER_TEST * _SHARE), 1)
                count = gl.minimum(step, num_whole - done)
                cut = count < step
                p, acc, m, l = _finish(
                    s, before, m, l, i, scale, inside, barriers, q.dtype, MMA, BLOCK, STAGES, MASKED=False
                )
                for j in range(1, count):
                    s, before = _begin(q, p, acc, i + j, buffers, barriers, MMA, P, BLOCK, STAGES)
                    p, acc, m, l = _finish(
                        s, before, m, l, i + j, scale, inside, barriers, q.dtype, MMA, BLOCK, STAGES, MASKED=False
                    )
                i += count
                done += count
                gain = 1 - l_before * _exp2(m_before - m) / l
                gain = gl.where((gain > 0) & (row < rows), gain, 0.0) / (step * BLOCK // UNIT)
            else:
                if not gains:
                    end_block.store(gl.full([1], i, gl.int32, one))
                _unused, acc = warpgroup_mma_wait(0, [s, before])
                mbarrier.arrive(v_free.index((i - 1) % STAGES), count=1)

        gathered = last + 1 if gains else gl.minimum(i + STAGES, last + 1)
        seen = done * BLOCK
        if gains & (seen < limit):  # the end of a ranking
            scores = warpgroup_mma_wait(0, [_scores(q, k_ring, k_full, i, MMA, BLOCK, STAGES)])
            mbarrier.arrive(k_free.index(i % STAGES), count=1)
            scores = gl.where(column[None, :] < limit - seen, scores, float("-inf"))
            w, m, l, keep = _softmax(scores, m, l, scale)
            weights = _unpack(_pack(w, q.dtype), q.dtype, P)
            acc = warpgroup_mma_wait(0, [_weighted(weights, _rescale(acc, keep), v_ring, v_full, i, STAGES)])
            mbarrier.arrive(v_free.index(i % STAGES), count=1)
            seen = limit
            i += 1
        query_row = tasks.index(task).load(one).item()
        mbarrier.arrive(task_free.index(slot), count=1)
        for b in range(i, gathered):  # in vain
            mbarrier.wait(k_full.index(b % STAGES), (b // STAGES) & 1)
            mbarrier.arrive(k_free.index(b % STAGES), count=1)
            mbarrier.wait(v_full.index(b % STAGES), (b // STAGES) & 1)
            mbarrier.arrive(v_free.index(b % STAGES), count=1)
        base = gathered

        # A row that must be computed again shows it, whether in its sum, in its values or in its maximum.
        total = gl.convert_layout(gl.where(gl.abs(m) < _CALM, l, float("nan")), gl.SliceLayout(1, ACC))
        result = gl.where(total[:, None] > 0, acc / total[:, None], total[:, None] * 0)
        out_row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        d = gl.arange(0, D, gl.SliceLayout(0, ACC))
        at = Out + query_row.to(gl.int64) * stride_o_token + head.to(gl.int64) * stride_o_head
        at = at + out_row[:, None] * stride_o_token + d[None, :]
        gl.store(at, result.to(Out.dtype.element_ty), mask=(out_row < rows)[:, None])
        mark = gl.max(gl.max(gl.where(gl.abs(result) < float("inf"), 0, 1), 1), 0)
        report = Report + work * (1 + HALVES)
        gl.store(report + 1 + half, mark)
        if half == 0:
            gl.store(report, rows * (query_pos - history + 1) + rows * (rows - 1) // 2 + seen * rows)

        turn += 1
        mbarrier.wait(task_full.index(turn & 1), (turn >> 1) & 1)
        rows = tasks.index((turn & 1) * FIELDS + 2).load(one).item()


@gluon.jit(do_not_specialize=["stride_table", "num_works"])
def _attend(
    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report, Next, num_works, num_heads,
    stride_q_token, stride_q_head, stride_block, stride_token, stride_k_head, stride_v_head,
    stride_o_token, stride_o_head, stride_table, scale,
    PAGE: gl.constexpr, GROUP: gl.constexpr, RANKED: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr,
    BLOCK: gl.constexpr, UNIT: gl.constexpr, INTERVAL: gl.constexpr, STAGES: gl.constexpr,
    VISIT_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Query.dtype.element_ty
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    ring: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2 * HALVES, ROWS, D], q_shared)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], ring)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], ring)
    end_block = gl.allocate_shared_memory(gl.int32, [1], plain)
    tasks = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], plain)
    verdict = gl.allocate_shared_memory(gl.float32, [4, 1], plain)
    met = gl.allocate_shared_memory(gl.int64, [1], bar)
    task_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    task_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    if HALVES == 2:  # else nobody waits for it, and Triton has its memory hold other things: see `lab.md`
        mbarrier.init(met, count=HALVES)
    for slot in gl.static_range(2):
        mbarrier.init(task_full.index(slot), count=GATHER_THREADS + 1)
        mbarrier.init(task_free.index(slot), count=HALVES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=GATHER_THREADS)
        mbarrier.init(v_full.index(stage), count=GATHER_THREADS)
        mbarrier.init(k_free.index(stage), count=HALVES)
        mbarrier.init(v_free.index(stage), count=HALVES)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    end_block.store(gl.full([1], 0, gl.int32, one))
    fence_async_shared()

    buffers = (k_ring, v_ring, end_block)
    barriers = (k_full, k_free, v_full, v_free)
    # Constants stay constants only in a call's own tuples.
    if HALVES == 1:
        gl.warp_specialize(
            [
                (
                    _visit,
                    (
                        0, queries, Out, Report, Thresholds, num_heads, stride_o_token, stride_o_head, scale,
                        buffers, barriers, tasks, task_full, task_free, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL,
                    ),
                ),
                (
                    gather,
                    (
                        Next, num_works, Query, Keys, Values, BlockTable, Segments, Tiles, Slots, queries, buffers,
                        barriers, tasks, task_full, task_free, num_heads, stride_q_token, stride_q_head, stride_block,
                        stride_token, stride_k_head, stride_v_head, stride_table,
                        GROUP, RANKED, D, HALVES, BLOCK, STAGES, PAGE,
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
                        0, queries, Out, Report, Thresholds, num_heads, stride_o_token, stride_o_head, scale,
                        buffers, barriers, tasks, task_full, task_free, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL,
                    ),
                ),
                (
                    _visit,
                    (
                        1, queries, Out, Report, Thresholds, num_heads, stride_o_token, stride_o_head, scale,
                        buffers, barriers, tasks, task_full, task_free, verdict, met,
                        D, BLOCK, STAGES, HALVES, UNIT, INTERVAL,
                    ),
                ),
                (
                    gather,
                    (
                        Next, num_works, Query, Keys, Values, BlockTable, Segments, Tiles, Slots, queries, buffers,
                        barriers, tasks, task_full, task_free, num_heads, stride_q_token, stride_q_head, stride_block,
                        stride_token, stride_k_head, stride_v_head, stride_table,
                        GROUP, RANKED, D, HALVES, BLOCK, STAGES, PAGE,
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
    programs: int = 0
    """How many share the tiles; 0: one a multiprocessor."""


def unsuitable(query, key_cache, value_cache, tile_size: int, interval: int) -> str | None:
    """Why this kernel cannot take such a problem and `prefill.attend` must, or None.

    Args:
        interval: keys between two stop tests.
    """
    if torch.cuda.get_device_capability(query.device)[0] != 9:
        return "the GPU is no Hopper"
    if FP8 in (query.dtype, key_cache.dtype):
        return "a quantised KV cache"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if query.shape[2] not in (64, 128):
        return f"head size {query.shape[2]}"
    if tile_size not in (64, 128):
        return f"tile_size={tile_size}"
    if interval % 32:  # blocks are whole between two tests; smaller ones were never run
        return f"a stop test every {interval} keys"
    strides = (key_cache.stride(), value_cache.stride())
    if strides[0][3] != 1 or strides[0][:2] != strides[1][:2] or max(strides[0] + strides[1]) >= 2**31:
        return "cache strides"
    # Rows are copied in pieces of 16 bytes, which Triton believes of strides that are multiples of 16, and addressed in
    # such steps, of which 32 bits count 64 GiB.
    steps = [s for stride in strides for s in stride[:3]]
    if any(s % 16 for s in query.stride()[:2]) or query.data_ptr() % 16:
        return "query alignment"
    if any(s % 16 for s in steps) or key_cache.data_ptr() % 16 or value_cache.data_ptr() % 16:
        return "cache alignment"
    blocks, block_size = key_cache.shape[:2]
    if ((blocks - 1) * strides[0][0] + (block_size - 1) * strides[0][1]) // 8 >= 2**32:
        return "cache size"
    return None


def attend(
    query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out,
    *, scale: float, key_block: int, stop_interval: int, tile_size: int, value_scale: float = 1.0,
    num_rankings: int | None = None, options: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """`prefill.attend` for what is not `unsuitable`, and a value_scale of 1."""
    num_heads, head_size = query.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    if options is None:  # tuned for tiles of 128 rows
        options = Launch(**tuned.options("hopper", head_size, query.device)) if tile_size == 128 else Launch()
    halves, num_works = tile_size // ROWS.value, len(tiles) * num_heads
    report = torch.empty(len(tiles), num_heads, 1 + halves, dtype=torch.int32, device=query.device)
    taken = torch.zeros(1, dtype=torch.int32, device=query.device)
    strides = key_cache.stride()
    programs = options.programs or torch.cuda.get_device_properties(query.device).multi_processor_count
    _attend[(min(programs, num_works),)](
        query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, report, taken,
        num_works, num_heads,
        query.stride(0), query.stride(1), strides[0], strides[1], strides[2], value_cache.stride(2),
        out.stride(0), out.stride(1), block_table.stride(0), scale * LOG2E,
        PAGE=block_size, GROUP=num_heads // num_kv_heads, RANKED=num_heads // (num_rankings or num_kv_heads),
        D=head_size, HALVES=halves,
        BLOCK=math.gcd(key_block * stop_interval, options.block), UNIT=key_block, INTERVAL=stop_interval,
        STAGES=options.num_stages, VISIT_REGISTERS=options.visit_registers,
        GATHER_REGISTERS=options.gather_registers, num_warps=4,
        # The warps of all roles start with equal shares.
        maxnreg=min(65536 // (128 * (halves + 1)) // 8 * 8, 248),
    )  # fmt: skip
    attend_marked(
        query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, report,
        scale=scale, value_scale=value_scale, key_block=key_block, stop_interval=stop_interval, tile_size=tile_size,
        num_rankings=num_rankings,
    )  # fmt: skip
    return report[..., 0]
