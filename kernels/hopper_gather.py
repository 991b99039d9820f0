"""Gluon, for Hopper GPUs: the warps of `hopper.py` that take tiles and copy rows from the cache for the others."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Triton 3.9 has another name for it.
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

GATHER_THREADS = gl.constexpr(128)
ROWS = gl.constexpr(64)
"""Query rows of a warp group."""


FIELDS = gl.constexpr(9)
"""Numbers that tell what a tile is: first query row, its position, rows (-1: no tile is left), history, limit, where
its ranking begins, sequence, its index among tiles times heads, and the share of the thresholds."""


@gluon.jit
def _announce(
    work, num_works, turn, Query, Segments, Tiles, queries, tasks, task_full, task_free,
    num_heads, stride_q_token, stride_q_head, RANKED: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Tell the halves what the tile of this turn is, and copy its queries."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    slot = turn & 1
    mbarrier.wait(task_free.index(slot), (turn >> 1) & 1 ^ 1)
    task = slot * FIELDS
    if work < num_works:
        head, tile = work % num_heads, work // num_heads
        segment = gl.load(Tiles + tile * 4)
        first = gl.load(Tiles + tile * 4 + 1)
        rows = gl.load(Tiles + tile * 4 + 2)
        # All of them before the first store, which they would wait for.
        sequence = gl.load(Segments + segment * 7)
        query_row = gl.load(Segments + segment * 7 + 1) + first
        query_pos = gl.load(Segments + segment * 7 + 2) + first
        history = gl.load(Segments + segment * 7 + 4)
        share = gl.load(Tiles + tile * 4 + 3)
        limit = gl.where(share == 0, history, gl.load(Segments + segment * 7 + 5))
        ranking = gl.load(Segments + segment * 7 + 6) + head // RANKED * history
        tasks.index(task).store(gl.full([1], query_row, gl.int32, one))
        tasks.index(task + 1).store(gl.full([1], query_pos, gl.int32, one))
        tasks.index(task + 2).store(gl.full([1], rows, gl.int32, one))
        tasks.index(task + 3).store(gl.full([1], history, gl.int32, one))
        tasks.index(task + 4).store(gl.full([1], limit, gl.int32, one))
        tasks.index(task + 5).store(gl.full([1], ranking, gl.int32, one))
        tasks.index(task + 6).store(gl.full([1], sequence, gl.int32, one))
        tasks.index(task + 7).store(gl.full([1], work, gl.int32, one))
        tasks.index(task + 8).store(gl.full([1], share, gl.int32, one))
        row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
        at = Query + query_row.to(gl.int64) * stride_q_token + head.to(gl.int64) * stride_q_head
        for half in gl.static_range(HALVES):
            # What lies beyond the tile repeats its last row, and is not stored.
            mine = gl.minimum(half * ROWS + row, rows - 1)
            copy_rows(queries.index(slot * HALVES + half), at + mine[:, None] * stride_q_token + d)
    else:
        tasks.index(task + 2).store(gl.full([1], -1, gl.int32, one))
    mbarrier.arrive(task_full.index(slot), count=1)
    async_copy.mbarrier_arrive(task_full.index(slot), increment_count=False)


@gluon.jit
def _copy_block(
    slot, i, live, keys, values, d, buffers, barriers, stride_block, stride_token,
    PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying the rows at these slots into the ring, as block i; nothing is copied unless `live`."""
    k_ring, v_ring, _ = buffers
    k_full, k_free, v_full, v_free = barriers
    # In 16-byte steps a row's place fits 32 bits, which spares registers.
    at = slot // PAGE * (stride_block // 8) + slot % PAGE * (stride_token // 8)
    at = (at.to(gl.uint32, bitcast=True).to(gl.int64) * 8)[:, None] + d
    stage = i % STAGES
    phase = (i // STAGES) & 1 ^ 1
    mbarrier.wait(k_free.index(stage), phase)
    if live:
        copy_rows(k_ring.index(stage), keys + at)
    async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
    mbarrier.wait(v_free.index(stage), phase)
    if live:
        copy_rows(v_ring.index(stage), values + at)
    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)


@gluon.jit
def gather(
    Next, num_works, Query, Keys, Values, BlockTable, Segments, Tiles, Slots, queries, buffers, barriers,
    tasks, task_full, task_free, num_heads, stride_q_token, stride_q_head, stride_block, stride_token, stride_k_head,
    stride_v_head, stride_table,
    GROUP: gl.constexpr, RANKED: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Of each tile, rows of the segment and then of its ranked history. Slots are read a block ahead: rows and the
    slots that name them are loads that wait for each other."""
    threads: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    end_block = buffers[2]

    turn = 0
    base = 0
    programs = gl.num_programs(0)
    work = gl.program_id(0)
    _announce(
        work, num_works, turn, Query, Segments, Tiles, queries, tasks, task_full, task_free,
        num_heads, stride_q_token, stride_q_head, RANKED, D, HALVES,
    )  # fmt: skip
    while work < num_works:
        task = (turn & 1) * FIELDS
        history = tasks.index(task + 3).load(one).item()
        limit = tasks.index(task + 4).load(one).item()
        ranking = Slots + tasks.index(task + 5).load(one).item()
        end = tasks.index(task + 1).load(one).item() + tasks.index(task + 2).load(one).item()
        table = BlockTable + tasks.index(task + 6).load(one).item().to(gl.int64) * stride_table
        kv_head = (work % num_heads // GROUP).to(gl.int64)
        keys, values = Keys + kv_head * stride_k_head, Values + kv_head * stride_v_head
        num_inside = gl.cdiv(end - history, BLOCK)

        position = gl.minimum(history + row, end - 1)
        page = gl.load(table + position // PAGE)
        for j in range(num_inside):
            slot = page * PAGE + position % PAGE
            position = gl.minimum(history + (j + 1) * BLOCK + row, end - 1)
            page = gl.load(table + position // PAGE)
            _copy_block(
                slot, base + j, True, keys, values, d, buffers, barriers, stride_block, stride_token, PAGE, STAGES
            )

        # The halves begin a block before they know that there is none: the last one holds nothing.
        ranked = row * 0 + limit > 0
        slot = gl.load(ranking + gl.minimum(row, limit - 1), mask=ranked, other=0)
        i = base + num_inside
        last = i + gl.cdiv(limit, BLOCK)
        seen = 0
        going = True
        while going:
            ahead = gl.load(ranking + gl.minimum(seen + BLOCK + row, limit - 1), mask=ranked, other=0)
            unused = end_block.load(one).item()  # of an earlier tile it is below this tile's first block
            live = (i < last) & ((unused <= base) | (i < unused))
            _copy_block(slot, i, live, keys, values, d, buffers, barriers, stride_block, stride_token, PAGE, STAGES)
            slot = ahead
            seen += BLOCK
            i += 1
            unused = end_block.load(one).item()
            going = (i <= last) & ((unused <= base) | (i < unused + STAGES))
        base = i

        # A ring of blocks is on its way: the next tile is taken while the halves still visit them.
        turn += 1
        work = programs + gl.atomic_add(Next, 1, sem="relaxed")
        _announce(
            work, num_works, turn, Query, Segments, Tiles, queries, tasks, task_full, task_free,
            num_heads, stride_q_token, stride_q_head, RANKED, D, HALVES,
        )  # fmt: skip
    async_copy.wait_group(0)
