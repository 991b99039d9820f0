"""Triton: the two-pass attention with early stop. See `naive.attend` for the meaning of every step.

One program owns a tile of query rows of one head. Pass 1 walks the segment's own keys in order;
pass 2 walks the ranked history and gathers K and V rows straight from the paged cache. The stop test
stands outside the inner loop: a `for` is software-pipelined by Triton, a `while` is not.

Products of whole blocks are fast, and wrong where a number is not finite: a value's NaN would reach the rows before it,
because 0 times NaN is NaN, and huge logits lose their maximum to the rounding of a fused multiplication. Such a tile
shows it in its result. It is marked, and a second kernel computes the marked tiles again, with care. There are none as
a rule, so the first kernel pays for a look at each result, and the second for reading a number or two of each tile.

What a kernel reports of a tile stands in `report`, int32 [num_tiles, num_heads, 1 + parts]: the pairs visited, and for
each part that computes rows of the tile by itself a mark, above 0 where the tile must be computed again.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import naive, tuned
from .common import block_dim, dot_precision, split_slot

LOG2E = 1.4426950408889634

_SHARE = tl.constexpr(naive.STEP_SHARE)
_WHOLE = tl.constexpr(naive.WHOLE)

CALM = tl.constexpr(2.0**22)
"""Largest maximum of scaled logits that a fast tile may end with. A fused multiplication and subtraction leaves half a
unit in the last place of the maximum as an exponent: here a quarter, at 2^31 more than float32 holds."""

LOOKED_AT = tl.constexpr(128)
"""Tiles of one head each that one program of the second kernel looks at."""


@triton.jit
def _load_rows(head, at, d_offsets, known, inside, KNOWN: tl.constexpr, INSIDE: tl.constexpr, TYPE: tl.constexpr):
    """Rows of K or V in a type; a mask costs time, and most loads need none."""
    rows = head + at[:, None] + d_offsets
    if KNOWN and INSIDE:
        return tl.load(rows).to(TYPE)
    if KNOWN:
        return tl.load(rows, mask=inside, other=0.0).to(TYPE)
    return tl.load(rows, mask=known[:, None] & inside, other=0.0).to(TYPE)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _softmax_step(acc, m, l, logits, values, scale, PRECISION: tl.constexpr, CAREFUL: tl.constexpr):
    """One block of the online softmax, in base 2; `scale` is positive. With care the maximum `m` is not scaled."""
    if CAREFUL:
        m_new = tl.maximum(m, tl.max(logits, 1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((logits - origin[:, None]) * scale)
        keep = tl.exp2((m - origin) * scale)
        # `naive.weighted`
        known = _finite(values.to(tl.float32))
        acc = tl.dot(p.to(values.dtype), tl.where(known, values, 0.0), acc * keep[:, None], input_precision=PRECISION)
        seen, bad = (logits > float("-inf")).to(values.dtype), tl.where(known, 0.0, 1.0).to(values.dtype)
        acc = tl.where(tl.dot(seen, bad, input_precision=PRECISION) > 0, float("nan"), acc)
    else:
        m_new = tl.maximum(m, tl.max(logits, 1) * scale)
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(logits * scale - origin[:, None])
        keep = tl.exp2(m - origin)
        acc = tl.dot(p.to(values.dtype), values, acc * keep[:, None], input_precision=PRECISION)
    return acc, m_new, l * keep + tl.sum(p, 1)


@triton.jit
def _visit(
    q, acc, m, l, k_head, v_head, ranking, start, until, k_dim, v_dim, inside, scale,
    stride_k_block, stride_k_token, stride_v_block, stride_v_token,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block of the ranked history; WHOLE: all of its keys exist."""
    n = start + tl.arange(0, BLOCK)
    known = n < until
    slot = tl.load(ranking + n) if WHOLE else tl.load(ranking + n, mask=known, other=0)
    page, within = split_slot(slot, PAGE)
    k = _load_rows(
        k_head, page * stride_k_block + within * stride_k_token, k_dim, known, inside, WHOLE, INSIDE, q.dtype
    )
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not WHOLE:
        logits = tl.where(known[None, :], logits, float("-inf"))
    v = _load_rows(
        v_head, page * stride_v_block + within * stride_v_token, v_dim, known, inside, WHOLE, INSIDE, q.dtype
    )
    return _softmax_step(acc, m, l, logits, v, scale, PRECISION, CAREFUL)


@triton.jit
def _tile(
    head, tile, num_heads,
    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report,
    stride_q_token, stride_q_head, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_block, stride_v_token, stride_v_head, stride_v_dim, stride_o_token, stride_o_head, stride_table,
    scale, value_scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, RANKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile of query rows of one head. GROUP heads share keys, RANKED heads a ranking of them."""
    kv_head = head // GROUP
    segment = tl.load(Tiles + tile * 4)
    first = tl.load(Tiles + tile * 4 + 1)
    rows = tl.load(Tiles + tile * 4 + 2)
    seq = tl.load(Segments + segment * 7)
    query_row = tl.load(Segments + segment * 7 + 1)
    query_pos = tl.load(Segments + segment * 7 + 2)
    history = tl.load(Segments + segment * 7 + 4)

    i = tl.arange(0, TILE)
    valid = i < rows
    end = query_pos + first + rows
    row = (query_row + first + i).to(tl.int64)
    position = query_pos + first + i
    d = tl.arange(0, BLOCK_D)
    INSIDE: tl.constexpr = BLOCK_D == D
    inside = (d < D)[None, :]
    k_dim, v_dim = (d * stride_k_dim)[None, :], (d * stride_v_dim)[None, :]
    q = tl.load(
        Query + row[:, None] * stride_q_token + head.to(tl.int64) * stride_q_head + d[None, :],
        mask=valid[:, None] & inside, other=0.0,
    ).to(Out.dtype.element_ty)  # fmt: skip
    k_head = Keys + kv_head.to(tl.int64) * stride_k_head
    v_head = Values + kv_head.to(tl.int64) * stride_v_head
    m = tl.full([TILE], float("-inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_D], tl.float32)

    # Pass 1: the segment's own keys, causal.
    table = BlockTable + seq.to(tl.int64) * stride_table
    for start in range(history, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        page = tl.load(table + key // PAGE, mask=key < end, other=0).to(tl.int64)
        within = key % PAGE
        k = _load_rows(
            k_head, page * stride_k_block + within * stride_k_token, k_dim, key < end, inside, False, INSIDE, q.dtype
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(key[None, :] <= position[:, None], logits, float("-inf"))
        v = _load_rows(
            v_head, page * stride_v_block + within * stride_v_token, v_dim, key < end, inside, False, INSIDE, q.dtype
        )
        acc, m, l = _softmax_step(acc, m, l, logits, v, scale, PRECISION, CAREFUL)

    # Pass 2: the history, most important keys first, until the tile gains nothing more.
    share = tl.load(Tiles + tile * 4 + 3)
    limit = tl.where(share == 0, history, tl.load(Segments + segment * 7 + 5))
    ranking = Slots + tl.load(Segments + segment * 7 + 6) + head // RANKED * history
    threshold = tl.load(Thresholds + head) * (share / _WHOLE)
    seen = 0
    going = limit > 0
    while going:
        m_before, l_before = m, l
        step = INTERVAL * UNIT * tl.maximum(seen // (INTERVAL * UNIT * _SHARE), 1)
        until = tl.minimum(seen + step, limit)
        if CAREFUL:  # every block is masked: less to compile, for what hardly ever runs
            for start in range(seen, until, BLOCK):
                acc, m, l = _visit(
                    q, acc, m, l, k_head, v_head, ranking, start, until, k_dim, v_dim, inside, scale,
                    stride_k_block, stride_k_token, stride_v_block, stride_v_token,
                    PAGE, BLOCK, False, INSIDE, PRECISION, CAREFUL,
                )  # fmt: skip
        else:
            whole = seen + (until - seen) // BLOCK * BLOCK
            for start in range(seen, whole, BLOCK):
                acc, m, l = _visit(
                    q, acc, m, l, k_head, v_head, ranking, start, until, k_dim, v_dim, inside, scale,
                    stride_k_block, stride_k_token, stride_v_block, stride_v_token,
                    PAGE, BLOCK, True, INSIDE, PRECISION, CAREFUL,
                )  # fmt: skip
            if whole < until:
                acc, m, l = _visit(
                    q, acc, m, l, k_head, v_head, ranking, whole, until, k_dim, v_dim, inside, scale,
                    stride_k_block, stride_k_token, stride_v_block, stride_v_token,
                    PAGE, BLOCK, False, INSIDE, PRECISION, CAREFUL,
                )  # fmt: skip
        gain = 1 - l_before * tl.exp2((m_before - m) * scale if CAREFUL else m_before - m) / l
        # A NaN row gains nothing, rounding must not look like a loss, and rows that pad the tile have no say.
        gain = tl.where((gain > 0) & valid, gain, 0.0) / tl.cdiv(until - seen, UNIT)
        seen = until
        going = (tl.max(gain, 0) >= threshold) & (seen < limit)

    out = tl.where(l[:, None] > 0, acc / l[:, None], l[:, None] * 0) * value_scale
    tl.store(
        Out + row[:, None] * stride_o_token + head.to(tl.int64) * stride_o_head + d[None, :],
        out.to(Out.dtype.element_ty), mask=valid[:, None] & inside,
    )  # fmt: skip
    pairs = tl.sum(tl.where(valid, position - history + 1, 0), 0) + seen * rows
    report = Report + (tile * num_heads + head) * (1 + PARTS)
    tl.store(report, pairs)
    if not CAREFUL:
        well = _finite(out) & (tl.abs(m) < CALM)[:, None]
        tl.store(report + 1, tl.max(tl.max(tl.where(well, 0, 1), 1), 0))


@triton.jit(do_not_specialize=["stride_table"])
def _attend(
    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report,
    stride_q_token, stride_q_head, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_block, stride_v_token, stride_v_head, stride_v_dim, stride_o_token, stride_o_head, stride_table,
    scale, value_scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, RANKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _tile(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0),
        Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report,
        stride_q_token, stride_q_head, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
        stride_v_block, stride_v_token, stride_v_head, stride_v_dim, stride_o_token, stride_o_head, stride_table, scale,
        value_scale, PAGE, GROUP, RANKED, D, BLOCK_D, TILE, BLOCK, UNIT, INTERVAL, PRECISION, False, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_table", "num_works"])
def _attend_marked(
    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report,
    num_works, num_heads,
    stride_q_token, stride_q_head, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
    stride_v_block, stride_v_token, stride_v_head, stride_v_dim, stride_o_token, stride_o_head, stride_table,
    scale, value_scale,
    PAGE: tl.constexpr, GROUP: tl.constexpr, RANKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The marked ones of some neighbouring tiles, one after the other."""
    first = tl.program_id(0) * LOOKED_AT
    looked_at = first + tl.arange(0, LOOKED_AT)
    marked = tl.zeros([LOOKED_AT], tl.int32)
    for part in tl.static_range(PARTS):
        marked += tl.load(Report + looked_at * (1 + PARTS) + 1 + part, mask=looked_at < num_works, other=0)
    if tl.max(marked, 0) > 0:
        for work in range(first, tl.minimum(first + LOOKED_AT, num_works)):
            mark = tl.load(Report + work * (1 + PARTS) + 1)
            if PARTS == 2:
                mark += tl.load(Report + work * (1 + PARTS) + 2)
            if mark > 0:
                _tile(
                    work % num_heads, work // num_heads, num_heads,
                    Query, Keys, Values, BlockTable, Segments, Tiles, Slots, Thresholds, Out, Report,
                    stride_q_token, stride_q_head, stride_k_block, stride_k_token, stride_k_head, stride_k_dim,
                    stride_v_block, stride_v_token, stride_v_head, stride_v_dim, stride_o_token, stride_o_head,
                    stride_table, scale, value_scale,
                    PAGE, GROUP, RANKED, D, BLOCK_D, TILE, BLOCK, UNIT, INTERVAL, PRECISION, True, PARTS,
                )  # fmt: skip


class Launch(NamedTuple):
    """How the kernel is built; none of it changes the result but by rounding."""

    block: int
    """Keys of one product: divides the keys between two stop tests."""
    num_warps: int
    num_stages: int


def launch(query: torch.Tensor, tile_size: int, interval: int) -> Launch:
    """What was measured on the device, for tiles of 128 rows and 16-bit types.

    Else two warp groups where a tile's accumulator would not fit one's registers; three stages, because slots and the
    rows that they name are loads that wait for each other, two for the largest heads.

    Args:
        interval: keys between two stop tests.
    """
    head_size = query.shape[2]
    size = block_dim(head_size)
    # Four bytes a number, of heads that are padded to 256: keys and values of 64 take more than there is. Of heads of
    # 32, ptxas 12.8 (which Triton 3.6 has) compiles products with 64 keys whose numbers lie apart wrongly:
    # tests/helpers/unwritten_registers.py.
    block = 64 if size > 32 and size * query.dtype.itemsize <= 512 else 32
    rule = dict(block=block, num_warps=8 if tile_size * size >= 128 * 128 else 4, num_stages=3 if size <= 128 else 2)
    if tile_size == 128 and query.dtype.itemsize <= 2:
        rule |= tuned.options("prefill", head_size, query.device)
    return Launch(**rule | {"block": math.gcd(interval, rule["block"])})


def attend(
    query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out,
    *, scale: float, key_block: int, stop_interval: int, tile_size: int, value_scale: float = 1.0,
    num_rankings: int | None = None, options: Launch | None = None,
) -> torch.Tensor:  # fmt: skip
    """`naive.attend` on the device. Returns the visited pairs, [num_tiles, num_heads] int32.

    `tile_size` is the most rows that a tile has. The last dimension of query and out must be dense, `scale` positive.
    """
    num_heads = query.shape[1]
    report = torch.empty(len(tiles), num_heads, 2, dtype=torch.int32, device=query.device)
    options = options or launch(query, tile_size, key_block * stop_interval)
    rules: dict[str, Any] = dict(
        key_block=key_block, stop_interval=stop_interval, tile_size=tile_size, num_rankings=num_rankings
    )  # fmt: skip
    tensors = (query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, report)
    _attend[(num_heads, len(tiles))](
        *tensors, *_strides(query, key_cache, value_cache, block_table, out), scale * LOG2E, value_scale,
        BLOCK=options.block, num_warps=options.num_warps, num_stages=options.num_stages,
        **_constants(query, key_cache, **rules),
    )  # fmt: skip
    attend_marked(*tensors, scale=scale, value_scale=value_scale, **rules)
    return report[..., 0]


def attend_marked(
    query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, report,
    *, scale: float, value_scale: float, key_block: int, stop_interval: int, tile_size: int,
    num_rankings: int | None = None,
) -> None:  # fmt: skip
    """Compute the tiles that `report` marks again, with care, into out and report."""
    num_works = report.shape[0] * report.shape[1]
    rules: dict[str, Any] = dict(
        key_block=key_block, stop_interval=stop_interval, tile_size=tile_size, num_rankings=num_rankings
    )  # fmt: skip
    tensors = (query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out, report)
    # No pipeline and small blocks: it must fit wherever the kernel fits that marks the tiles, and is not to be fast.
    _attend_marked[(triton.cdiv(num_works, LOOKED_AT.value),)](
        *tensors, num_works, report.shape[1],
        *_strides(query, key_cache, value_cache, block_table, out), scale * LOG2E, value_scale,
        BLOCK=math.gcd(key_block * stop_interval, 32), PARTS=report.shape[2] - 1, num_warps=8, num_stages=1,
        **_constants(query, key_cache, **rules),
    )  # fmt: skip


def _strides(query, key_cache, value_cache, block_table, out) -> tuple[int, ...]:
    caches = (*key_cache.stride(), *value_cache.stride())
    return (query.stride(0), query.stride(1), *caches, out.stride(0), out.stride(1), block_table.stride(0))


def _constants(
    query, key_cache, key_block: int, stop_interval: int, tile_size: int, num_rankings: int | None
) -> dict:  # fmt: skip
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key_cache.shape[2]
    return dict(
        PAGE=key_cache.shape[1], GROUP=num_heads // num_kv_heads, RANKED=num_heads // (num_rankings or num_kv_heads),
        D=head_size, BLOCK_D=block_dim(head_size),
        TILE=tile_size, UNIT=key_block, INTERVAL=stop_interval, PRECISION=dot_precision(query),
    )  # fmt: skip
