"""Triton: the ranking of history keys, and the optional query order. See `naive.py` for shapes and meaning.

    pool      mean query of each (segment, KV head)                      one program per pair
    score     mean queries x keys, straight from the paged cache         matrix units, 16+ segments at once
    moments   sum and sum of squares of each block of scores
    classify  score -> importance class, and how many of each per block  one program per (pair, block of keys)
    scatter   slots to their place in the ranking                        the same

The last three are a stable counting sort: no atomics, so two runs give the same ranking, and keys of
one class keep the order of their positions, which the gather of the second pass likes.

Sizes that change from step to step are not specialised on: a server must not compile while it serves.
"""

import torch
import triton
import triton.language as tl

from . import naive
from .common import block_dim, dot_precision, split_slot
from .tables import MAX_SCORED_TOGETHER

SCORE_KEYS = 128
"""Keys scored by one program."""
SORT_BLOCK = 2048
"""Keys counted by one program."""
COUNT_CHUNK = 128
"""Keys counted at a time: a table of COUNT_CHUNK x num_classes lives in registers."""
PLACE_CHUNK = 32
"""Keys placed at a time, by one warp: the running counts then never leave it."""

_BOUND = tl.constexpr(naive.SCORE_BOUND)


@triton.jit
def _pool(
    Query, Segments, Mean, num_kv_heads, stride_token, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    segment, kv_head = tl.program_id(0), tl.program_id(1)
    query_row = tl.load(Segments + segment * 7 + 1).to(tl.int64)
    num_queries = tl.load(Segments + segment * 7 + 3)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, num_queries, ROWS):
        row = start + tl.arange(0, ROWS)
        at = Query + (query_row + row)[:, None] * stride_token + d[None, :]
        mask = (row < num_queries)[:, None] & (d < D)[None, :]
        for head in tl.static_range(GROUP):
            total += tl.load(at + (kv_head * GROUP + head) * stride_head, mask=mask, other=0).to(tl.float32)
    mean = tl.sum(total, 0) / (num_queries * GROUP)
    tl.store(Mean + (segment * num_kv_heads + kv_head) * D + d, mean.to(Mean.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["stride_table"])
def _score(
    Mean, Keys, BlockTable, Segments, Groups, Scores, num_kv_heads,
    stride_block, stride_token, stride_head, stride_dim, stride_table,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SEGMENTS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of up to SEGMENTS segments of one sequence against KEYS keys of one head."""
    start = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1)
    first = tl.load(Groups + tl.program_id(2) * 2)
    count = tl.load(Groups + tl.program_id(2) * 2 + 1)
    seq = tl.load(Segments + first * 7)
    # The group's segments lie in falling order of history: the first sees every key that any sees.
    longest = tl.load(Segments + first * 7 + 4)
    if start >= longest:
        return
    member = tl.arange(0, SEGMENTS)
    segment = first + member
    present = member < count
    history = tl.load(Segments + segment * 7 + 4, mask=present, other=0)
    offset = tl.load(Segments + segment * 7 + 6, mask=present, other=0)

    d = tl.arange(0, BLOCK_D)
    at = Mean + (segment[:, None] * num_kv_heads + kv_head) * D + d[None, :]
    mean = tl.load(at, mask=present[:, None] & (d < D)[None, :], other=0)
    key = start + tl.arange(0, KEYS)
    page = tl.load(BlockTable + seq.to(tl.int64) * stride_table + key // PAGE, mask=key < longest, other=0)
    row = page.to(tl.int64) * stride_block + (key % PAGE) * stride_token + kv_head.to(tl.int64) * stride_head
    known = (key < longest)[None, :] & (d < D)[:, None]
    keys = tl.load(Keys + row[None, :] + (d * stride_dim)[:, None], mask=known, other=0)
    scores = tl.dot(mean, keys, input_precision=PRECISION)
    scores = tl.where(scores == scores, scores, -_BOUND)
    scores = tl.minimum(tl.maximum(scores, -_BOUND), _BOUND)

    begin = offset + kv_head * history
    visible = present[:, None] & (key[None, :] < history[:, None])
    tl.store(Scores + begin[:, None] + key[None, :], scores, mask=visible)


@triton.jit(do_not_specialize=["num_blocks"])
def _moments(Segments, Scores, Moments, num_kv_heads, num_blocks, BLOCK: tl.constexpr):
    """Sum and sum of squares of one block of one ranking's scores, relative to its first score:
    an offset that all scores share would drown their spread."""
    block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    history = tl.load(Segments + segment * 7 + 4)
    begin = tl.load(Segments + segment * 7 + 6) + kv_head * history
    key = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < history:
        first = tl.load(Scores + begin)
        score = tl.load(Scores + begin + key, mask=key < history, other=0)
        score = tl.where(key < history, score - first, 0.0)
        at = Moments + ((segment * num_kv_heads + kv_head) * num_blocks + block) * 3
        tl.store(at, tl.sum(score, 0))
        tl.store(at + 1, tl.sum(score * score, 0))
        # Kept apart, because the scores are overwritten while other blocks still ask for it.
        tl.store(at + 2, first)


@triton.jit(do_not_specialize=["num_blocks"])
def _classify(
    Segments, Scores, Moments, Counts, num_kv_heads, num_blocks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    ABOVE: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    history = tl.load(Segments + segment * 7 + 4)
    if block * BLOCK >= history:
        return
    begin = tl.load(Segments + segment * 7 + 6) + kv_head * history
    pair = segment * num_kv_heads + kv_head

    total = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    used = tl.cdiv(history, BLOCK)
    for start in range(0, used, ROWS):
        b = start + tl.arange(0, ROWS)
        at = Moments + (pair * num_blocks + b) * 3
        total += tl.load(at, mask=b < used, other=0)
        squares += tl.load(at + 1, mask=b < used, other=0)
    mean = tl.sum(total, 0) / history
    deviation = tl.sqrt(tl.maximum(tl.sum(squares, 0) / history - mean * mean, 0))
    top = mean + ABOVE * deviation + tl.load(Moments + pair * num_blocks * 3 + 2)
    per_class = CLASSES / ((ABOVE + BELOW) * tl.maximum(deviation, 1e-20))

    counts = tl.zeros([CLASSES], tl.int32)
    for start in range(0, tl.minimum(BLOCK, history - block * BLOCK), CHUNK):
        key = block * BLOCK + start + tl.arange(0, CHUNK)
        score = tl.load(Scores + begin + key, mask=key < history, other=0)
        # The class replaces the score: it is computed once, so that the count and the placement agree.
        cls = tl.minimum(tl.maximum((top - score) * per_class, 0), CLASSES - 1).to(tl.int32)
        tl.store(Scores + begin + key, cls.to(tl.float32), mask=key < history)
        hit = (cls[:, None] == tl.arange(0, CLASSES)[None, :]) & (key < history)[:, None]
        counts += tl.sum(hit.to(tl.int32), 0)
    tl.store(Counts + (pair * num_blocks + block) * CLASSES + tl.arange(0, CLASSES), counts)


@triton.jit(do_not_specialize=["num_blocks", "stride_table"])
def _scatter(
    Segments, Scores, Counts, BlockTable, Slots, num_kv_heads, num_blocks, stride_table,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    history = tl.load(Segments + segment * 7 + 4)
    if block * BLOCK >= history:
        return
    seq = tl.load(Segments + segment * 7)
    begin = tl.load(Segments + segment * 7 + 6) + kv_head * history
    pair = segment * num_kv_heads + kv_head

    # Where each class of this block goes: after all better classes, and after this class of earlier blocks.
    classes = tl.arange(0, CLASSES)
    total = tl.zeros([CLASSES], tl.int32)
    earlier = tl.zeros([CLASSES], tl.int32)
    used = tl.cdiv(history, BLOCK)
    for start in range(0, used, ROWS):
        b = start + tl.arange(0, ROWS)
        at = Counts + (pair * num_blocks + b)[:, None] * CLASSES + classes[None, :]
        counts = tl.load(at, mask=(b < used)[:, None], other=0)
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((b < block)[:, None], counts, 0), 0)
    place = tl.cumsum(total, 0) - total + earlier

    for start in range(0, tl.minimum(BLOCK, history - block * BLOCK), CHUNK):
        key = block * BLOCK + start + tl.arange(0, CHUNK)
        cls = tl.load(Scores + begin + key, mask=key < history, other=0).to(tl.int32)
        hit = ((cls[:, None] == classes[None, :]) & (key < history)[:, None]).to(tl.int32)
        rank = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + place[None, :]), 1)
        page = tl.load(BlockTable + seq.to(tl.int64) * stride_table + key // PAGE, mask=key < history, other=0)
        tl.store(Slots + begin + rank, page * PAGE + key % PAGE, mask=key < history)
        place += tl.sum(hit, 0)


@triton.jit
def _guide(
    Query, Keys, Segments, Slots, Products, num_kv_heads, stride_q_token, stride_q_head,
    stride_block, stride_token, stride_head, stride_dim,
    PAGE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    S: tl.constexpr, ROWS: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Product of each query of a segment with the mean of the segment's best keys; 0 without a history."""
    segment, head = tl.program_id(0), tl.program_id(1)
    query_row = tl.load(Segments + segment * 7 + 1).to(tl.int64)
    num_queries = tl.load(Segments + segment * 7 + 3)
    history = tl.load(Segments + segment * 7 + 4)
    kv_head = head // GROUP
    ranking = Slots + tl.load(Segments + segment * 7 + 6) + kv_head * history
    best = tl.minimum(history, BEST)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, best, ROWS):
        i = start + tl.arange(0, ROWS)
        page, within = split_slot(tl.load(ranking + i, mask=i < best, other=0), PAGE)
        row = page * stride_block + within * stride_token + kv_head.to(tl.int64) * stride_head
        at = Keys + row[:, None] + (d * stride_dim)[None, :]
        total += tl.load(at, mask=(i < best)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
    guide = tl.sum(total, 0) / tl.maximum(best, 1)
    for start in range(0, num_queries, ROWS):
        i = start + tl.arange(0, ROWS)
        at = Query + (query_row + i)[:, None] * stride_q_token + head * stride_q_head + d[None, :]
        q = tl.load(at, mask=(i < num_queries)[:, None] & (d < D)[None, :], other=0).to(tl.float32)
        product = tl.sum(q * guide[None, :], 1)
        out = Products + (segment * tl.num_programs(1) + head) * S + i
        tl.store(out, product, mask=i < num_queries)


def rank_keys(
    query, key_cache, block_table, segments, num_slots: int, num_classes: int,
    *, max_history: int, groups, workspace=None,
) -> torch.Tensor:  # fmt: skip
    """`naive.rank_keys` on the device, without a host synchronisation.

    Further args:
        max_history: the longest history among the segments.
        groups: [num_groups, 2] int32 on the device, from `tables.score_groups`: the segments of a group
            belong to one sequence and lie in falling order of history.
        workspace: (slots, scores), int32 and fp32 of at least num_slots each; allocated when None.
    """
    block_size, num_kv_heads, head_size = key_cache.shape[1:]
    if workspace is None:
        workspace = (query.new_empty(num_slots, dtype=torch.int32), query.new_empty(num_slots, dtype=torch.float32))
    slots, scores = workspace
    if not max_history:
        return slots
    count, group = len(segments), query.shape[1] // num_kv_heads
    mean = torch.empty(count, num_kv_heads, head_size, dtype=query.dtype, device=query.device)
    dims = dict(D=head_size, BLOCK_D=block_dim(head_size))
    _pool[(count, num_kv_heads)](
        query, segments, mean, num_kv_heads, query.stride(0), query.stride(1), GROUP=group, ROWS=32, **dims
    )
    together = 16 if len(groups) == count else MAX_SCORED_TOGETHER
    _score[(triton.cdiv(max_history, SCORE_KEYS), num_kv_heads, len(groups))](
        mean, key_cache, block_table, segments, groups, scores, num_kv_heads,
        *key_cache.stride(), block_table.stride(0),
        PAGE=block_size, SEGMENTS=together, KEYS=SCORE_KEYS, PRECISION=dot_precision(query), **dims,
    )  # fmt: skip
    num_blocks = triton.cdiv(max_history, SORT_BLOCK)
    grid = (num_blocks, num_kv_heads, count)
    moments = torch.empty(count, num_kv_heads, num_blocks, 3, dtype=torch.float32, device=query.device)
    counts = torch.empty(count, num_kv_heads, num_blocks, num_classes, dtype=torch.int32, device=query.device)
    _moments[grid](segments, scores, moments, num_kv_heads, num_blocks, BLOCK=SORT_BLOCK)
    sort = dict(BLOCK=SORT_BLOCK, CLASSES=num_classes)
    _classify[grid](
        segments, scores, moments, counts, num_kv_heads, num_blocks, ROWS=64, CHUNK=COUNT_CHUNK,
        ABOVE=naive.CLASSES_ABOVE, BELOW=naive.CLASSES_BELOW, **sort,
    )  # fmt: skip
    _scatter[grid](
        segments, scores, counts, block_table, slots, num_kv_heads, num_blocks, block_table.stride(0),
        PAGE=block_size, ROWS=16, CHUNK=PLACE_CHUNK, num_warps=1, **sort,
    )  # fmt: skip
    return slots


def order_queries(query, key_cache, segments, slots, segment_len: int) -> torch.Tensor:
    """`naive.order_queries` on the device."""
    block_size, num_kv_heads, head_size = key_cache.shape[1:]
    num_heads = query.shape[1]
    # Rows beyond a segment's queries keep -inf and so come last.
    products = query.new_full((len(segments), num_heads, segment_len), float("-inf"), dtype=torch.float32)
    _guide[(len(segments), num_heads)](
        query, key_cache, segments, slots, products, num_kv_heads, query.stride(0), query.stride(1),
        *key_cache.stride(),
        PAGE=block_size, GROUP=num_heads // num_kv_heads, D=head_size, BLOCK_D=block_dim(head_size),
        S=segment_len, ROWS=32, BEST=naive.NUM_GUIDE_KEYS,
    )  # fmt: skip
    # NaN products must not move a query out of its segment: they sort as the lowest finite value.
    products = products.nan_to_num(nan=torch.finfo(torch.float32).min, posinf=None, neginf=float("-inf"))
    return products.argsort(dim=-1, descending=True, stable=True).int()
