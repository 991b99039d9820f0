"""The oracle: every stage of S2O in plain fp32 PyTorch, to be read beside the method's description.

A stage has the same name and arguments here, in `cpu.py` and in the Triton files. Shapes:

    query          [num_tokens, num_heads, head_size]
    key_cache      [num_blocks, block_size, num_kv_heads, head_size], any strides; value_cache likewise
    block_table    [num_seqs, max_blocks] int32
    segments       [num_segments, 7] int32, the columns of `plan.Segment`
    tiles          [num_tiles, 4] int32, the columns of `plan.Tile`
    slots          [num_slots] int32: the rankings, one behind the other (`plan.Segment.offset`)
    thresholds     [num_heads] fp32

A history has one ranking for each KV head, which its query heads share, or one for each query head: `num_rankings` of
them, which the query heads divide into equal groups of neighbours.

Arguments that only the device needs (sizes known to the host, workspace) are accepted and ignored here.

A *slot* is a token's place in the cache: block * block_size + offset in the block.

The method's second step, another order of the queries inside a segment, is left out: it errs no less at equal density.

What is not finite stays where dense attention would have it, row by row: a query's NaN in its row, a value's in the
rows that see its key. It takes no part in a ranking, and a row that is NaN gains nothing, so that it holds no tile
back.
"""

import math

import torch

SEQ, QUERY_ROW, QUERY_POS, NUM_QUERIES, HISTORY, VISIT_LIMIT, OFFSET = range(7)

# A tile has so many of this many parts of the thresholds: all where they hold as given, none where it never stops.
WHOLE = 1 << 16

# Scores are brought into this range before they are compared, so that NaN and Inf keep the ranking a permutation
# and squares stay finite. What is not inside it, of queries as of scores, has no say in how the others are ranked.
SCORE_BOUND = 1e15

# A key matters if one of the segment's queries reaches it, though their mean may not. The logits of a key spread over
# the queries about as a normal distribution does whose deviation is that of independent dimensions; a few hundred
# queries reach some three deviations above the mean. Chosen among 1 to 6 by error at equal density on a model's own
# attention: with more, keys that are merely long come before those that the mean finds.
DEVIATIONS = 2.0

# Steps of the second pass grow: each is at least `stop_interval` key blocks, and a quarter of what was visited. Tests
# are then dense where a block more or less counts, and few in a long history.
STEP_SHARE = 4

# Importance classes divide the history by the share of keys that a normal distribution has above a score, and their
# widths grow with that share: near the front, where tiles stop, a class must hold few keys. Widths in terms of the
# score would be stretched by outliers, such as the first token's key. The logistic function of 1.702 times a normal
# variable stays within 1 % of its distribution.
LOGISTIC = 1.702

# The first tokens are visited first: many heads send there what they need nowhere else, and these keys are so short
# that their spread would rank them late.
FIRST_TOKENS = 8

# Mean and deviation are those of every 16th score: they only place the borders of classes. The sample leaves out the
# first tokens, whose keys are unlike all others; a history is never shorter than 16.
SAMPLE_EVERY = 16


def read_rows(cache: torch.Tensor, slots: torch.Tensor, kv_head: int) -> torch.Tensor:
    """Rows of one KV head, [len(slots), head_size] fp32."""
    block_size = cache.shape[1]
    slots = slots.long()
    return cache[slots // block_size, slots % block_size, kv_head].float()


def slots_of(block_table: torch.Tensor, seq: int, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the tokens at these positions of a sequence lie."""
    return block_table[seq, positions // block_size] * block_size + positions % block_size


def ranking_of(slots: torch.Tensor, segment: list[int], ranking: int) -> torch.Tensor:
    """One segment's history slots as one of its rankings has them: a view of [history]."""
    begin = segment[OFFSET] + ranking * segment[HISTORY]
    return slots[begin : begin + segment[HISTORY]]


def importance_classes(scores: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Classes of scores, [history] in the order of positions; class 0 holds the highest, and the first tokens."""
    scores = torch.where(scores.isnan(), -SCORE_BOUND, scores).clamp(-SCORE_BOUND, SCORE_BOUND)
    sample = scores[FIRST_TOKENS::SAMPLE_EVERY]
    sample = sample[sample.abs() < SCORE_BOUND]
    sample = sample if len(sample) else scores.new_zeros(1)
    mean, deviation = sample.mean(), sample.std(correction=0)
    above = torch.sigmoid(-LOGISTIC * (scores - mean) / deviation.clamp(min=1e-20))
    classes = (num_classes * above.sqrt()).clamp(max=num_classes - 1).int()
    classes[:FIRST_TOKENS] = 0
    return classes


def in_bounds(queries: torch.Tensor) -> torch.Tensor:
    """0 for each number that is NaN, infinite or out of all proportion."""
    return torch.where(queries.abs() < SCORE_BOUND, queries, 0.0)


def importance(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Scores of keys for a segment: the mean of their products with its queries, and DEVIATIONS times the spread.

    Args:
        keys: [history, head_size] fp32; queries: [num_queries, head_size] fp32, of all heads that share the ranking.
    """
    queries = in_bounds(queries)
    spread = keys.square() @ queries.var(0, correction=0)
    return keys @ queries.mean(0) + DEVIATIONS * spread.sqrt()


def step_blocks(seen: int, stop_interval: int) -> int:
    """Key blocks of the next step of the second pass, after `seen` of them."""
    return stop_interval * max(1, seen // (stop_interval * STEP_SHARE))


def rank_keys(
    query, key_cache, block_table, segments, num_slots: int, num_classes: int, *, num_rankings: int | None = None,
    **_device_only,
) -> torch.Tensor:  # fmt: skip
    """Step 3: the history of each segment, most important keys first.

    All queries of the segment, over the query heads that share a ranking, rank the keys together, by `importance`. Keys
    of one importance class keep the order of their positions.

    Args:
        num_rankings: of each history; by default one for each KV head.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_rankings = num_rankings or num_kv_heads
    group = query.shape[1] // num_rankings
    slots = torch.full((num_slots,), -1, dtype=torch.int32, device=query.device)
    for segment in segments.tolist():
        rows = slice(segment[QUERY_ROW], segment[QUERY_ROW] + segment[NUM_QUERIES])
        positions = torch.arange(segment[HISTORY], device=query.device)
        history = slots_of(block_table, segment[SEQ], positions, block_size)
        if not len(history):
            continue
        for ranking in range(num_rankings):
            queries = query[rows, ranking * group : (ranking + 1) * group].float().flatten(0, 1)
            scores = importance(read_rows(key_cache, history, ranking * num_kv_heads // num_rankings), queries)
            best_first = importance_classes(scores, num_classes).argsort(stable=True)
            ranking_of(slots, segment, ranking).copy_(history[best_first])
    return slots


def weighted(weights: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """weights [rows, keys] times values [keys, head_size]; a value that is not finite is for rows that see its key
    only.

    A plain product would give it to all of them: 0 times NaN is NaN.
    """
    bad = ~values.isfinite()
    if not bad.any():
        return weights @ values
    product = weights @ values.masked_fill(bad, 0.0)
    return product.masked_fill(seen.float() @ bad.float() > 0, math.nan)


class Softmax:
    """The online softmax of one tile: running maximum m, mass l and weighted values acc of each row."""

    def __init__(self, rows: int, head_size: int, device: torch.device):
        self.m = torch.full((rows,), -math.inf, device=device)
        self.l = torch.zeros(rows, device=device)
        self.acc = torch.zeros(rows, head_size, device=device)

    def add(self, logits: torch.Tensor, values: torch.Tensor) -> None:
        """logits [rows, keys], -inf where a key is not visible; values [keys, head_size]."""
        m = torch.maximum(self.m, logits.amax(1))
        origin = torch.where(m == -math.inf, 0.0, m)  # a row that has seen nothing yet stays empty
        p, keep = torch.exp(logits - origin[:, None]), torch.exp(self.m - origin)
        self.m, self.l = m, self.l * keep + p.sum(1)
        self.acc = self.acc * keep[:, None] + weighted(p, values, logits > -math.inf)

    def output(self) -> torch.Tensor:
        return torch.where(self.l[:, None] > 0, self.acc / self.l[:, None], self.l[:, None] * 0)


def attend(
    query,
    key_cache,
    value_cache,
    block_table,
    segments,
    tiles,
    slots,
    thresholds,
    out,
    *,
    scale: float,
    key_block: int,
    stop_interval: int,
    value_scale: float = 1.0,
    num_rankings: int | None = None,
    **_device_only,
) -> torch.Tensor:
    """Steps 4 and 5: dense causal attention inside the segment, then the ranked history until the gain is small.

    After each step of `step_blocks` key blocks the marginal gain of a row is taken: the mass that these blocks
    added, relative to the accumulated mass, per block. The tile stops once none of its rows gains the tile's share of
    `threshold` any more. Tiles whose share is 0 visit all.

    Writes `out`, shaped like query; returns the pairs visited, [num_tiles, num_heads] int64.

    Args:
        scale: factor on the logits, with those of quantised queries and keys.
        value_scale: factor on the result, of quantised values.
        num_rankings: as `rank_keys` made them.
    """
    num_heads, head_size = query.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_rankings = num_rankings or num_kv_heads
    visited = torch.zeros(len(tiles), num_heads, dtype=torch.int64, device=query.device)
    for index, (seg, first, rows, share) in enumerate(tiles.tolist()):
        segment = segments[seg].tolist()
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            places = torch.arange(first, first + rows, device=query.device)
            q = query[segment[QUERY_ROW] + places, head].float() * scale
            positions = segment[QUERY_POS] + places
            softmax = Softmax(rows, head_size, query.device)

            # Pass 1: the segment itself.
            keys = torch.arange(segment[HISTORY], int(positions[-1]) + 1, device=query.device)
            inside = slots_of(block_table, segment[SEQ], keys, block_size)
            logits = q @ read_rows(key_cache, inside, kv_head).T
            logits = logits.masked_fill(keys[None, :] > positions[:, None], -math.inf)
            softmax.add(logits, read_rows(value_cache, inside, kv_head))
            pairs = int((positions - segment[HISTORY] + 1).sum())

            # Pass 2: the history, most important keys first.
            ranking = ranking_of(slots, segment, head * num_rankings // num_heads)
            ranking = ranking[: segment[VISIT_LIMIT if share else HISTORY]]
            seen = 0
            while seen < len(ranking):
                m, mass = softmax.m, softmax.l
                now = ranking[seen : seen + key_block * step_blocks(seen // key_block, stop_interval)]
                for block in now.split(key_block):
                    logits = q @ read_rows(key_cache, block, kv_head).T
                    softmax.add(logits, read_rows(value_cache, block, kv_head))
                seen += len(now)
                gain = 1 - mass * torch.exp(m - softmax.m) / softmax.l
                gain = gain.nan_to_num(0).clamp(min=0) / -(-len(now) // key_block)
                if gain.max() < thresholds[head] * (share / WHOLE):
                    break
            out[segment[QUERY_ROW] + places, head] = (softmax.output() * value_scale).to(out.dtype)
            visited[index, head] = pairs + seen * rows
    return visited


def dense_attention(query, key_cache, value_cache, block_table, query_start_loc, seq_lens, scale: float):
    """Causal attention without any of the above, [num_tokens, num_heads, head_size] fp32."""
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    out = torch.zeros(query.shape, device=query.device)
    starts = query_start_loc.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        keys = torch.arange(seq_len, device=query.device)
        lie = slots_of(block_table, seq, keys, block_size)
        visible = keys[None, :] <= keys[seq_len - (starts[seq + 1] - starts[seq]) :, None]
        for head in range(query.shape[1]):
            logits = query[rows, head].float() @ read_rows(key_cache, lie, head // group).T * scale
            logits = logits.masked_fill(~visible, -math.inf)
            values = read_rows(value_cache, lie, head // group)
            out[rows, head] = weighted(logits.softmax(1), values, logits > -math.inf)
    return out
