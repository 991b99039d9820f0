"""The CPU path: the stages of `naive.py` on whole segments at a time, skipping what the stop rule skips.

All of a segment's tiles of the heads that share a ranking walk it together; tiles that have stopped leave the
batch, so that every step is one matrix product over those still running. Products are in fp32:
PyTorch rounds the results of bf16 products to bf16, which would spoil the logits.
"""

import math

import torch

from . import naive
from .naive import HISTORY, NUM_QUERIES, QUERY_POS, QUERY_ROW, SEQ, VISIT_LIMIT

KEYS = 512
"""Keys at a time: what is held must not grow with the square of the segment, nor with the steps of a long history."""


def rank_keys(
    query, key_cache, block_table, segments, num_slots: int, num_classes: int, *, num_rankings: int | None = None,
    **_device_only,
) -> torch.Tensor:  # fmt: skip
    """`naive.rank_keys`: one product scores a sequence's keys for all of its segments."""
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_rankings = num_rankings or num_kv_heads
    sharing = num_rankings // num_kv_heads
    slots = torch.full((num_slots,), -1, dtype=torch.int32)
    table = segments.tolist()
    # [num_segments, num_rankings, head_size] each, over the queries of all heads that share a ranking
    queries = [naive.in_bounds(query[s[QUERY_ROW] : s[QUERY_ROW] + s[NUM_QUERIES]].float()) for s in table]
    queries = [q.unflatten(1, (num_rankings, -1)).transpose(1, 2).flatten(0, 1) for q in queries]
    means = torch.stack([q.mean(0) for q in queries])
    variances = torch.stack([q.var(0, correction=0) for q in queries])
    for seq in sorted({s[SEQ] for s in table}):
        mine = [i for i, s in enumerate(table) if s[SEQ] == seq and s[HISTORY]]
        if not mine:
            continue
        longest = max(table[i][HISTORY] for i in mine)
        lie = naive.slots_of(block_table, seq, torch.arange(longest), block_size)
        for kv_head in range(num_kv_heads):
            keys = naive.read_rows(key_cache, lie, kv_head).T
            squares = keys.square()
            for ranking in range(kv_head * sharing, (kv_head + 1) * sharing):
                spread = (variances[mine, ranking] @ squares).sqrt_()
                scores = (means[mine, ranking] @ keys).add_(spread, alpha=naive.DEVIATIONS)
                for row, i in zip(scores, mine, strict=True):
                    history = table[i][HISTORY]
                    classes = naive.importance_classes(row[:history], num_classes)
                    best_first = classes.to(torch.uint8).argsort(stable=True)
                    naive.ranking_of(slots, table[i], ranking).copy_(lie[:history][best_first])
    return slots


def attend(
    query, key_cache, value_cache, block_table, segments, tiles, slots, thresholds, out,
    *, scale: float, key_block: int, stop_interval: int, value_scale: float = 1.0, num_rankings: int | None = None,
    **_device_only,
) -> torch.Tensor:  # fmt: skip
    """`naive.attend`. Returns the visited pairs, [num_tiles, num_heads] int64."""
    num_heads = query.shape[1]
    num_kv_heads = key_cache.shape[2]
    num_rankings = num_rankings or num_kv_heads
    group = num_heads // num_rankings
    visited = torch.zeros(len(tiles), num_heads, dtype=torch.int64)
    tile_rows = tiles.tolist()
    for index, segment in enumerate(segments.tolist()):
        mine = [i for i, tile in enumerate(tile_rows) if tile[0] == index]
        firsts = [tile_rows[i][1] for i in mine]
        counts = [tile_rows[i][2] for i in mine]
        shares = torch.tensor([tile_rows[i][3] for i in mine])
        dense = shares == 0
        for number in range(num_rankings):
            heads, kv_head = slice(number * group, (number + 1) * group), number * num_kv_heads // num_rankings
            # Nothing gains less than 0: a dense tile never stops.
            rules = (thresholds[heads, None] * (shares / naive.WHOLE)).flatten()
            stacked = _Segment(query, segment, heads, firsts, counts, rules, scale)
            _inside(stacked, key_cache, value_cache, block_table, segment, kv_head)
            ranking, limit = naive.ranking_of(slots, segment, number), segment[VISIT_LIMIT]
            every = torch.arange(len(rules))
            for active, first, end in ((every, 0, limit), (every[dense.repeat(group)], limit, len(ranking))):
                _history(
                    stacked, active, key_cache, value_cache, ranking[:end], first, kv_head, key_block, stop_interval
                )
            stacked.write(out, value_scale)
            visited[mine, heads] = stacked.pairs().T
    return visited


class _Segment:
    """The tiles of one segment and ranking, stacked: [tiles of all heads of the group, rows, ...]."""

    def __init__(self, query, segment, heads, firsts, counts, thresholds, scale):
        self.rows = max(counts)
        self.history = segment[HISTORY]
        group, tiles = heads.stop - heads.start, len(counts)
        # Padding rows repeat the tile's last row, so that they gain what it gains, and are left out of the output.
        within = torch.arange(self.rows)
        count = torch.tensor(counts)
        place = torch.tensor(firsts)[:, None] + torch.minimum(within, count[:, None] - 1)  # [tiles, rows]
        self.valid = (within < count[:, None]).repeat(group, 1)  # [group * tiles, rows]
        place = place.repeat(group, 1)  # [group * tiles, rows]
        self.row = segment[QUERY_ROW] + place
        self.position = segment[QUERY_POS] + place
        self.head = torch.arange(heads.start, heads.stop).repeat_interleave(tiles)[:, None]
        self.q = query[self.row, self.head].float() * scale
        self.threshold = thresholds
        self.m = torch.full(self.row.shape, -math.inf)
        self.l = torch.zeros(self.row.shape)
        self.acc = torch.zeros(*self.row.shape, query.shape[2])
        self.seen = torch.zeros(group * tiles, dtype=torch.int64)
        self.shape = (group, tiles)

    def add(self, active: torch.Tensor, logits: torch.Tensor, values: torch.Tensor) -> None:
        """The online softmax of the active tiles."""
        before_m, before_l = self.m[active], self.l[active]
        m = torch.maximum(before_m, logits.amax(-1))
        origin = torch.where(m == -math.inf, 0.0, m)
        finite = values.isfinite().all()
        seen = None if finite else (logits > -math.inf).flatten(0, 1)
        p = logits.sub_(origin[..., None]).exp_()
        keep = torch.exp(before_m - origin)
        l = before_l * keep + p.sum(-1)
        self.m[active], self.l[active] = m, l
        p = p.flatten(0, 1)
        added = p @ values if seen is None else naive.weighted(p, values, seen)
        self.acc[active] = self.acc[active].mul_(keep[..., None]).add_(added.view(*m.shape, -1))

    def still_gaining(self, active: torch.Tensor, m: torch.Tensor, l: torch.Tensor, blocks: int) -> torch.Tensor:
        """Whose last step of some key blocks gained enough; m and l are the active tiles' before it."""
        gain = 1 - l * torch.exp(m - self.m[active]) / self.l[active]
        gain = gain.nan_to_num(0).clamp(min=0) / blocks
        return gain.amax(1) >= self.threshold[active]

    def write(self, out: torch.Tensor, value_scale: float) -> None:
        result = torch.where(self.l[..., None] > 0, self.acc / self.l[..., None], self.l[..., None] * 0)
        head = self.head.expand_as(self.row)
        out[self.row[self.valid], head[self.valid]] = (result[self.valid] * value_scale).to(out.dtype)

    def pairs(self) -> torch.Tensor:
        """[heads of the group, tiles]"""
        inside = ((self.position - self.history + 1) * self.valid).sum(1)
        return (inside + self.seen * self.valid.sum(1)).view(self.shape)


def _inside(stacked: _Segment, key_cache, value_cache, block_table, segment, kv_head: int) -> None:
    """Pass 1: the segment's own keys, over the tiles that see any of them."""
    end = segment[QUERY_POS] + segment[NUM_QUERIES]
    for start in range(segment[HISTORY], end, KEYS):
        keys = torch.arange(start, min(start + KEYS, end))
        lie = naive.slots_of(block_table, segment[SEQ], keys, key_cache.shape[1])
        active = (stacked.position.amax(1) >= start).nonzero().squeeze(1)
        q = stacked.q[active]
        logits = (q.flatten(0, 1) @ naive.read_rows(key_cache, lie, kv_head).T).view(*q.shape[:2], -1)
        logits.masked_fill_(keys > stacked.position[active][..., None], -math.inf)
        stacked.add(active, logits, naive.read_rows(value_cache, lie, kv_head))


def _history(
    stacked: _Segment, active, key_cache, value_cache, ranking, seen: int, kv_head: int, key_block: int,
    stop_interval: int,
):  # fmt: skip
    """Pass 2: the ranking after the keys that were `seen`, step by step, over the tiles that still gain."""
    while seen < len(ranking) and len(active):
        now = ranking[seen : seen + key_block * naive.step_blocks(seen // key_block, stop_interval)]
        seen += len(now)
        m, l, q = stacked.m[active], stacked.l[active], stacked.q[active]
        for some in now.split(KEYS):
            logits = (q.flatten(0, 1) @ naive.read_rows(key_cache, some, kv_head).T).view(*q.shape[:2], -1)
            stacked.add(active, logits, naive.read_rows(value_cache, some, kv_head))
        stacked.seen[active] = seen
        active = active[stacked.still_gaining(active, m, l, -(-len(now) // key_block))]
