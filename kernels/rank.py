"""Triton: the ranking of history keys. See `naive.py` for shapes and meaning.

    pool      mean and variance of each (segment, ranking)'s queries one program per pair
    spread    mean and deviation of a sample of the scores           matrix units, 16+ segments at once
    score     pooled queries x keys -> importance classes, one byte  the same, straight from the paged cache
    count     how many keys of each class each block has             one program per (pair, a few blocks)
    offsets   where each class of each block goes in the ranking     one program per pair
    place     slots to their place in the ranking                    one program per (pair, block)

The last three are a stable counting sort: no atomics, so two runs give the same ranking, and keys of
one class keep the order of their positions, which the gather of the second pass likes. A score is computed once
and never stored: of each key, one byte is written and read twice, and a slot is written.

Sizes that change from step to step are not specialised on: a server must not compile while it serves.
"""

import math

import torch
import triton
import triton.language as tl

from . import naive
from .common import block_dim, dot_precision, shared_memory, short, wide
from .tables import MAX_SCORED_TOGETHER, SORT_BLOCK, SPREAD_KEYS, table_words

SCORE_KEYS = 128
"""Keys scored at a time, fewer where they are wider than SCORE_ROW."""
SCORE_ROW = 256
"""Bytes of a key up to which so many fit the shared memory, with the segments' means and variances."""
SCORE_PART = 512
"""Keys scored by one program: what it must know of its segments it learns once."""
COUNTED_BLOCKS = 4
"""Blocks that one program counts."""

_DEVIATIONS = tl.constexpr(naive.DEVIATIONS)
_BOUND = tl.constexpr(naive.SCORE_BOUND)
_EVERY = tl.constexpr(naive.SAMPLE_EVERY)
_FIRST = tl.constexpr(naive.FIRST_TOKENS)


@triton.jit
def _in_bounds(queries):
    """`naive.in_bounds`."""
    return tl.where(tl.abs(queries) < _BOUND, queries, 0.0)


@triton.jit
def _pool(
    Query, Segments, Mean, Variance, num_rankings, stride_token, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    segment, ranking = tl.program_id(0), tl.program_id(1)
    query_row = tl.load(Segments + segment * 7 + 1).to(tl.int64)
    num_queries = tl.load(Segments + segment * 7 + 3)
    Query += ranking.to(tl.int64) * GROUP * stride_head
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    # Around one of the queries: squares around 0 would drown a small variance in a large mean.
    origin = tl.load(Query + query_row * stride_token + d, mask=d < D, other=0.0)
    origin = _in_bounds(origin.to(tl.float32))
    for start in range(0, num_queries, ROWS):
        row = start + tl.arange(0, ROWS)
        at = Query + (query_row + row)[:, None] * stride_token + d[None, :]  # of one head after the other
        mask = (row < num_queries)[:, None] & (d < D)[None, :]
        for _ in tl.static_range(GROUP):
            query = _in_bounds(tl.load(at, mask=mask, other=0.0).to(tl.float32))
            apart = tl.where(mask, query - origin[None, :], 0.0)
            total += apart
            squares += apart * apart
            at += stride_head
    step = tl.sum(total, 0) / (num_queries * GROUP)
    variance = tl.sum(squares, 0) / (num_queries * GROUP) - step * step
    variance = tl.maximum(variance, 0.0)  # rounding
    at = (segment * num_rankings + ranking) * D + d
    tl.store(Mean + at, (origin + step).to(Mean.dtype.element_ty), mask=d < D)
    tl.store(Variance + at, variance.to(Variance.dtype.element_ty), mask=d < D)


@triton.jit
def _scores(
    Mean, Variance, Keys, table, segment, ranking, present, key, known, kv_head, num_rankings,
    stride_block, stride_token, stride_head, stride_dim,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[rankings, keys] scores of the keys at some positions of their sequence: `naive.importance`, in bounds."""
    d = tl.arange(0, BLOCK_D)
    at = (segment * num_rankings + ranking)[:, None] * D + d[None, :]
    pooled = present[:, None] & (d < D)[None, :]
    mean = tl.load(Mean + at, mask=pooled, other=0)
    variance = tl.load(Variance + at, mask=pooled, other=0)
    page = tl.load(table + key // PAGE, mask=known, other=0)
    row = page.to(tl.int64) * stride_block + (key % PAGE) * stride_token + kv_head.to(tl.int64) * stride_head
    mask = known[None, :] & (d < D)[:, None]
    keys = tl.load(Keys + row[None, :] + (d * stride_dim)[:, None], mask=mask, other=0.0).to(mean.dtype)
    squares = keys.to(tl.float32)
    squares = (squares * squares).to(variance.dtype)
    spread = tl.sqrt(tl.dot(variance, squares, input_precision=PRECISION))
    scores = tl.dot(mean, keys, input_precision=PRECISION) + _DEVIATIONS * spread
    scores = tl.where(scores == scores, scores, -_BOUND)
    return tl.minimum(tl.maximum(scores, -_BOUND), _BOUND)


@triton.jit
def _rankings(Segments, Groups, SHARING: tl.constexpr, COLUMNS: tl.constexpr):
    """What a program scores of a group of segments: (KV head, sequence, longest history; segments, rankings, present).

    SHARING rankings of each segment are of the same keys. Keys are read once for COLUMNS of these: few segments fill
    the operand with the rankings of all heads that share them. The programs of a KV head take its columns in turn,
    and there are as many as it has rankings: some are left without.
    """
    kv_head, turn = tl.program_id(1) // SHARING, tl.program_id(1) % SHARING
    first = tl.load(Groups + tl.program_id(2) * 2)
    columns = tl.load(Groups + tl.program_id(2) * 2 + 1) * SHARING
    column = turn * COLUMNS + tl.arange(0, COLUMNS)
    segment = first + column // SHARING
    # The group's segments lie in falling order of history: the first of these sees every key that any sees.
    leads = Segments + (first + turn * COLUMNS // SHARING) * 7
    longest = tl.load(leads + 4, mask=turn * COLUMNS < columns, other=0)
    return (
        kv_head,
        tl.load(Segments + first * 7),
        longest,
        segment,
        kv_head * SHARING + column % SHARING,
        column < columns,
    )


@triton.jit
def _join(n, mean, squares, n_more, mean_more, squares_more):
    """Count, mean and sum of squared deviations of two samples together."""
    both = tl.maximum(n + n_more, 1)
    step = mean_more - mean
    squares += squares_more + step * step * (n * n_more / both)
    return n + n_more, mean + step * (n_more / both), squares


@triton.jit(do_not_specialize=["stride_table", "num_parts"])
def _spread(
    Mean, Variance, Keys, BlockTable, Segments, Groups, Spread, num_rankings, num_parts,
    stride_block, stride_token, stride_head, stride_dim, stride_table,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SHARING: tl.constexpr,
    COLUMNS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of one part of the sample, for up to COLUMNS rankings."""
    part = tl.program_id(0)
    kv_head, seq, longest, segment, ranking, present = _rankings(Segments, Groups, SHARING, COLUMNS)
    history = tl.load(Segments + segment * 7 + 4, mask=present, other=0)
    table = BlockTable + seq.to(tl.int64) * stride_table
    n = tl.zeros([COLUMNS], tl.float32)
    mean = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(part * PART, (part + 1) * PART, KEYS):
        key = (start + tl.arange(0, KEYS)) * _EVERY + _FIRST
        if start * _EVERY < longest:
            scores = _scores(
                Mean, Variance, Keys, table, segment, ranking, present, key, key < longest, kv_head, num_rankings,
                stride_block, stride_token, stride_head, stride_dim, PAGE, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            visible = (key[None, :] < history[:, None]) & (tl.abs(scores) < _BOUND)
            # Each block around its own mean, then joined: one sum of squares would drown in a large common offset.
            n_here = tl.sum(visible.to(tl.float32), 1)
            mean_here = tl.sum(tl.where(visible, scores, 0.0), 1) / tl.maximum(n_here, 1)
            apart = tl.where(visible, scores - mean_here[:, None], 0.0)
            n, mean, squares = _join(n, mean, squares, n_here, mean_here, tl.sum(apart * apart, 1))
    at = Spread + ((segment * num_rankings + ranking) * num_parts + part) * 3
    tl.store(at, n, mask=present)
    tl.store(at + 1, mean, mask=present)
    tl.store(at + 2, squares, mask=present)


@triton.jit(do_not_specialize=["stride_table", "num_parts"])
def _score(
    Mean, Variance, Keys, BlockTable, Segments, Groups, Spread, Classes, num_rankings, num_parts,
    stride_block, stride_token, stride_head, stride_dim, stride_table,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SHARING: tl.constexpr,
    COLUMNS: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr, CLASSES: tl.constexpr,
    LOGISTIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Importance classes of PART keys in up to COLUMNS rankings of them."""
    begin_key = tl.program_id(0) * PART
    kv_head, seq, longest, segment, ranking, present = _rankings(Segments, Groups, SHARING, COLUMNS)
    if begin_key >= longest:
        return
    history = tl.load(Segments + segment * 7 + 4, mask=present, other=0)
    offset = tl.load(Segments + segment * 7 + 6, mask=present, other=0)
    table = BlockTable + seq.to(tl.int64) * stride_table

    n = tl.zeros([COLUMNS], tl.float32)
    mean = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for part in range(num_parts):
        at = Spread + ((segment * num_rankings + ranking) * num_parts + part) * 3
        n_here = tl.load(at, mask=present, other=0)
        mean_here = tl.load(at + 1, mask=present, other=0)
        n, mean, squares = _join(n, mean, squares, n_here, mean_here, tl.load(at + 2, mask=present, other=0))
    slope = LOGISTIC / tl.maximum(tl.sqrt(squares / tl.maximum(n, 1)), 1e-20)

    # Segments are whole tiles, 16 rows at least: with that the compiler stores 16 classes at a time.
    begin = tl.multiple_of(offset + ranking * history, [16])
    history = tl.multiple_of(history, [16])
    for start in range(begin_key, tl.minimum(begin_key + PART, longest), KEYS):
        key = start + tl.arange(0, KEYS)
        scores = _scores(
            Mean, Variance, Keys, table, segment, ranking, present, key, key < longest, kv_head, num_rankings,
            stride_block, stride_token, stride_head, stride_dim, PAGE, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        # The square root of the logistic function.
        share = tl.rsqrt(1 + tl.exp2((scores - mean[:, None]) * slope[:, None]))
        cls = tl.minimum(share * CLASSES, CLASSES - 1).to(tl.int32).to(tl.uint8)
        cls = tl.where(key[None, :] < _FIRST, 0, cls)
        visible = present[:, None] & (key[None, :] < history[:, None])
        tl.store(Classes + begin[:, None] + key[None, :], cls, mask=visible)


@triton.jit(do_not_specialize=["num_blocks"])
def _count(
    Segments, Classes, Counts, num_rankings, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    ranking, segment = tl.program_id(1), tl.program_id(2)
    history = tl.multiple_of(tl.load(Segments + segment * 7 + 4), 16)
    begin = tl.multiple_of(tl.load(Segments + segment * 7 + 6) + ranking * history, 16)
    for i in tl.static_range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        if block * BLOCK < history:
            key = block * BLOCK + tl.arange(0, BLOCK)
            cls = tl.load(Classes + begin + key, mask=key < history, other=0).to(tl.int32)
            counts = tl.histogram(cls, CLASSES)
            # What lies beyond the end was read as class 0.
            beyond = tl.maximum((block + 1) * BLOCK - history, 0)
            counts -= tl.where(tl.arange(0, CLASSES) == 0, beyond, 0)
            at = Counts + ((segment * num_rankings + ranking) * num_blocks + block) * CLASSES
            tl.store(at + tl.arange(0, CLASSES), counts)


@triton.jit(do_not_specialize=["num_blocks"])
def _offsets(
    Segments, Counts, num_rankings, num_blocks, BLOCK: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Counts become places: after all better classes, and after this class of earlier blocks."""
    ranking, segment = tl.program_id(0), tl.program_id(1)
    used = tl.cdiv(tl.load(Segments + segment * 7 + 4), BLOCK)
    classes = tl.arange(0, CLASSES)
    table = Counts + (segment * num_rankings + ranking) * num_blocks * CLASSES + classes[None, :]
    total = tl.zeros([CLASSES], tl.int32)
    for start in range(0, used, ROWS):
        b = start + tl.arange(0, ROWS)
        total += tl.sum(tl.load(table + b[:, None] * CLASSES, mask=(b < used)[:, None], other=0), 0)
    place = tl.cumsum(total, 0) - total
    for start in range(0, used, ROWS):
        b = start + tl.arange(0, ROWS)
        counts = tl.load(table + b[:, None] * CLASSES, mask=(b < used)[:, None], other=0)
        tl.store(table + b[:, None] * CLASSES, place[None, :] + tl.cumsum(counts, 0) - counts, mask=(b < used)[:, None])
        place += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["num_blocks", "stride_table"])
def _place(
    Segments, Classes, Offsets, BlockTable, Slots, num_rankings, num_blocks, stride_table,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    block, ranking, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    history = tl.load(Segments + segment * 7 + 4)
    if block * BLOCK >= history:
        return
    table = BlockTable + tl.load(Segments + segment * 7).to(tl.int64) * stride_table
    # A thread takes neighbouring keys, which makes the running counts below cheap.
    history = tl.multiple_of(history, 16)
    begin = tl.multiple_of(tl.load(Segments + segment * 7 + 6) + ranking * history, 16)
    key = block * BLOCK + tl.arange(0, BLOCK)
    known = key < history
    cls = tl.load(Classes + begin + key, mask=known, other=0).to(tl.int32)
    page = tl.load(table + key // PAGE, mask=known, other=0)

    # The place of a key among those of its class: running counts of four classes at a time, 16 bits each.
    shift = (cls % 4) * 16
    unit = tl.full([BLOCK], 1, tl.int64) << shift
    rank = tl.zeros([BLOCK], tl.int32)
    for four in tl.static_range(CLASSES // 4):
        mine = known & (cls // 4 == four)
        running = tl.cumsum(tl.where(mine, unit, 0), 0)
        rank = tl.where(mine, ((running >> shift) & 0xFFFF).to(tl.int32), rank)
    at = Offsets + ((segment * num_rankings + ranking) * num_blocks + block) * CLASSES + cls
    place = tl.load(at, mask=known, other=0) + rank - 1
    tl.store(Slots + begin + place, page * PAGE + key % PAGE, mask=known)


def score_options(query, together: int, shared: int, strides: tuple[int, int, int, int]) -> dict:
    """Tiles of the kernels that score keys, for rankings that are scored `together` at most, within `shared` bytes.
    Stages take more of it where a key's elements lie apart, or its beginning anywhere: `strides` are those of the cache
    [blocks, block_size, kv_heads, size]."""
    width = block_dim(query.shape[2]) * wide(query).itemsize
    columns = max(together, 16)
    aligned = strides[3] == 1 and all(stride % 16 == 0 for stride in strides[:3])  # as Triton specialises
    stages = 3 if aligned or width <= SCORE_ROW else 2
    return dict(
        COLUMNS=columns, KEYS=SCORE_KEYS * SCORE_ROW // max(width, SCORE_ROW), PRECISION=dot_precision(query),
        # Without a pipeline on GPUs whose shared memory holds what the attention needs, and not three stages of keys.
        num_warps=8 if columns > 32 else 4, num_stages=stages if shared >= 128 * 1024 else 1,
    )  # fmt: skip


def rank_keys(
    query, key_cache, block_table, segments, num_slots: int, num_classes: int,
    *, max_history: int, groups, num_rankings: int | None = None, workspace=None, count_keys=_count, place_keys=_place,
) -> torch.Tensor:  # fmt: skip
    """`naive.rank_keys` on the device, without a host synchronisation.

    Further args:
        max_history: the longest history among the segments.
        groups: [num_groups, 2] int32 on the device, from `tables.score_groups`: the segments of a group
            belong to one sequence and lie in falling order of history.
        workspace: (slots, classes, tables): int32 and uint8 of at least num_slots each, and int32 of at least
            `tables.table_words`; allocated when None.
        count_keys, place_keys: the kernels of these steps, where there are better ones than this file's.
    """
    block_size, num_kv_heads, head_size = key_cache.shape[1:]
    num_rankings = num_rankings or num_kv_heads
    count, group, sharing = len(segments), query.shape[1] // num_rankings, num_rankings // num_kv_heads
    if workspace is None:
        words = table_words(count, num_rankings, count * num_rankings * max_history, head_size, num_classes)
        sizes = ((num_slots, torch.int32), (num_slots, torch.uint8), (words, torch.int32))
        workspace = tuple(query.new_empty(size, dtype=dtype) for size, dtype in sizes)
    slots, classes, tables = workspace
    if not max_history:
        return slots
    num_parts = triton.cdiv(max_history, naive.SAMPLE_EVERY * SPREAD_KEYS)
    num_blocks = triton.cdiv(max_history, SORT_BLOCK)
    pairs = count * num_rankings
    # Kernels are specialised on addresses by 16 bytes, so the largest comes first and all of them keep to that.
    begin_mean = pairs * num_blocks * num_classes
    begin_variance = begin_mean + pairs * head_size
    begin_spread = begin_variance + pairs * head_size
    counts, mean = tables[:begin_mean], tables[begin_mean:begin_variance].view(wide(query))
    # Squares of fp16 numbers do not fit fp16.
    squares = torch.float32 if query.dtype == torch.float32 else short(query.device)
    variance = tables[begin_variance:begin_spread].view(squares)
    spread = tables[begin_spread:].view(torch.float32)
    dims = dict(D=head_size, BLOCK_D=block_dim(head_size))
    _pool[(count, num_rankings)](
        query, segments, mean, variance, num_rankings, query.stride(0), query.stride(1), GROUP=group, ROWS=32, **dims
    )
    where = (*key_cache.stride(), block_table.stride(0))
    # The heads of one segment alone leave most of a large operand empty.
    together = sharing if len(groups) == count and sharing <= 16 else MAX_SCORED_TOGETHER
    product = score_options(query, together, shared_memory(query.device), key_cache.stride())
    product |= dict(PAGE=block_size, SHARING=sharing, **dims)
    _spread[(num_parts, num_rankings, len(groups))](
        mean, variance, key_cache, block_table, segments, groups, spread, num_rankings, num_parts, *where,
        PART=SPREAD_KEYS, **product,
    )  # fmt: skip
    _score[(triton.cdiv(max_history, SCORE_PART), num_rankings, len(groups))](
        mean, variance, key_cache, block_table, segments, groups, spread, classes, num_rankings, num_parts, *where,
        PART=SCORE_PART, CLASSES=num_classes, LOGISTIC=naive.LOGISTIC / math.log(2), **product,
    )  # fmt: skip
    sort = dict(BLOCK=SORT_BLOCK, CLASSES=num_classes)
    count_keys[(triton.cdiv(num_blocks, COUNTED_BLOCKS), num_rankings, count)](
        segments, classes, counts, num_rankings, num_blocks, BLOCKS=COUNTED_BLOCKS, num_warps=1, **sort
    )
    _offsets[(num_rankings, count)](segments, counts, num_rankings, num_blocks, ROWS=32, **sort)
    place_keys[(num_blocks, num_rankings, count)](
        segments, classes, counts, block_table, slots, num_rankings, num_blocks, block_table.stride(0),
        PAGE=block_size, num_warps=1, **sort,
    )  # fmt: skip
    return slots
