"""From lengths to work: the segments and tiles of one prefill step.

Pure functions on integers: no tensor, no device, no vLLM.

    sequence   0 ........................ seq_len
    segments   |--- S ---|--- S ---|--- S ---|--|     at absolute positions, however the prompt is cut
    this step                  [queries .........)
    history    |<------ keys before a segment, visited in ranked order
    tiles                      |-|---|---|---|--|     query rows that stop together

A segment that this step enters in its middle keeps its borders: its history and its tiles are
those that the whole prompt would have had.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_TILES = 65535
"""Of one wave: as many rows as a CUDA grid has."""

MAX_PAIRS = 4096
"""Of one wave: segments times rankings, of which each has a mean, a variance and counts in the workspace's tables."""

WHOLE = 1 << 16
"""What thresholds are divided into."""


class Segment(NamedTuple):
    """Queries that share a ranking. One row of the table that the kernels read."""

    seq: int
    """Row of the block table."""
    query_row: int
    """Row, in the packed query, of the first query."""
    query_pos: int
    """Position of that query in its sequence."""
    num_queries: int
    history: int
    """Keys before the segment: also the position where the segment starts."""
    visit_limit: int
    """History keys that may be visited: all of them, or the share that a fixed budget allows."""
    offset: int
    """Where, in its wave's flat list of slots, this segment's rankings begin: number r has
    `history` entries from `offset + r * history`."""


class Tile(NamedTuple):
    """Query rows that stop together: those from `first` up to `first + rows` of the segment."""

    segment: int
    """Index into the wave's segments."""
    first: int
    rows: int
    share: int
    """Of the thresholds, in units of 1 / `WHOLE`: that much where they hold as given, less after a long history, and 0
    where the tile visits all of it, whatever it gains and whatever the segment's `visit_limit`."""


@dataclass(frozen=True)
class Wave:
    """Segments whose rankings are held at the same time, and the tiles that read them."""

    segments: tuple[Segment, ...]
    tiles: tuple[Tile, ...]
    num_slots: int
    """Length of the flat list of slots: the sum of `history` over segments and rankings."""
    max_history: int


@dataclass(frozen=True)
class StepPlan:
    """The sparse work of one step: what `attention.run` executes for each layer."""

    waves: tuple[Wave, ...]
    seqs: tuple[int, ...]
    """The rows that are attended here."""
    num_seqs: int
    num_rankings: int
    """Of each history, for which the waves have room."""
    causal_pairs: tuple[int, ...]
    """Per row of the batch: (query, key) pairs that causality allows; 0 where the row is not attended here."""


def threshold_share(history: int, reference_len: int | None) -> int:
    """What holds of the thresholds after so many keys, in units of 1 / `WHOLE`; never 0, which would be dense.

    A tile that stops leaves out blocks that would have added less than the threshold each. Twice the history has twice
    as many of them: where each may add half as much, all together may add the same.
    """
    if reference_len is None or history <= reference_len:
        return WHOLE
    return max(WHOLE * reference_len // history, 1)


def causal_pairs(query_len: int, seq_len: int) -> int:
    """Pairs under the causal mask when the last `query_len` tokens of `seq_len` are queries."""
    return query_len * (seq_len - query_len) + query_len * (query_len + 1) // 2


def split_segments(seq: int, query_row: int, query_len: int, seq_len: int, segment_len: int) -> Iterator[Segment]:
    """The segments that the last `query_len` tokens of a sequence fall into."""
    pos = seq_len - query_len
    while pos < seq_len:
        start = pos // segment_len * segment_len
        end = min(start + segment_len, seq_len)
        yield Segment(seq, query_row, pos, end - pos, start, start, 0)
        query_row += end - pos
        pos = end


def split_tiles(
    index: int,
    segment: Segment,
    tile_size: int,
    dense_from: int | None = None,
    reference_len: int | None = None,
) -> Iterator[Tile]:
    """Tiles of one segment. Their borders are at absolute positions too, so that a prompt cut
    in the middle of a segment leaves every other tile as it was.

    Args:
        dense_from: tiles that hold this position of the sequence or a later one are dense.
        reference_len: keys before a segment for which the thresholds hold; by default any number.
    """
    end = segment.query_pos + segment.num_queries
    dense_from = end if dense_from is None else dense_from
    share = threshold_share(segment.history, reference_len)
    lead = (segment.query_pos - segment.history) % tile_size
    first = 0
    while first < segment.num_queries:
        rows = min(tile_size - lead, segment.num_queries - first)
        yield Tile(index, first, rows, 0 if segment.query_pos + first + rows > dense_from else share)
        first += rows
        lead = 0


def dense_runs(query_lens: Sequence[int], sparse: Sequence[int]) -> list[tuple[int, int]]:
    """Runs [first, last) of neighbouring rows that are not sparse and have queries."""
    runs, first, chosen = [], 0, set(sparse)
    for row in [*sorted(chosen), len(query_lens)]:
        if sum(query_lens[first:row]):
            runs.append((first, row))
        first = row + 1
    return runs


def workspace_slots(max_seq_len: int, max_tokens: int, segment_len: int, num_rankings: int, max_slots: int) -> int:
    """The most index entries that a wave of any step can hold.

    One long prompt needs the most that is useful, and many short ones are cut into more waves; a single
    history is held whole, however long. Pass the result to `make_plan` as max_slots.
    """
    one = max_seq_len * num_rankings
    return max(one, min(max_slots, (max_tokens // segment_len + 2) * one))


def most_segments(max_tokens: int, segment_len: int, min_query_len: int) -> int:
    """The most segments of any step: each row may begin and end inside one."""
    return max_tokens // segment_len + 2 * (max_tokens // max(min_query_len, 1) + 1)


def make_plan(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    segment_len: int,
    tile_size: int,
    num_rankings: int,
    max_slots: int,
    budget: float | None = None,
    seqs: Sequence[int] | None = None,
    dense_from: Sequence[int] | None = None,
    reference_len: int | None = None,
) -> StepPlan:
    """Cut the given rows of a batch into waves of segments and tiles.

    Args:
        query_lens, seq_lens: per row of the batch; a row's queries are the last tokens of its sequence.
        num_rankings: of a history: one for each KV head, or for each query head.
        max_slots: the most index entries that one wave may hold; a single segment is never split. Tables are as wide as
            a wave's longest history: its segments times that stay below twice as much.
        budget: share of the history that may be visited; None for all of it.
        seqs: the rows to attend here; all by default.
        dense_from: per row of the batch, the position from which on queries attend to everything; none by default.
        reference_len: keys before a segment for which the thresholds hold; by default any number.
    """
    chosen = tuple(range(len(query_lens)) if seqs is None else seqs)
    attended = frozenset(chosen)  # looked up once per row
    row, segments = 0, list[Segment]()
    for seq, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if seq in attended:
            segments += split_segments(seq, row, query_len, seq_len, segment_len)
        row += query_len
    if budget is not None:
        segments = [s._replace(visit_limit=-int(-budget * s.history // 1)) for s in segments]

    # The longest histories first: their tiles take longest, and the short ones fill the gaps at the end.
    # Neighbours of one sequence stay together, so that they can be scored in one product.
    waves: list[Wave] = []
    batch: list[Segment] = []
    used = longest = tiles = 0
    for segment in reversed(segments):
        need = segment.history * num_rankings
        longest = max(longest, need)
        most_tiles = segment.num_queries // tile_size + 2
        full = (
            used + need > max_slots
            or (len(batch) + 1) * longest > 2 * max_slots
            or (len(batch) + 1) * num_rankings > MAX_PAIRS
            or tiles + most_tiles > MAX_TILES
        )
        if batch and full:
            waves.append(_wave(batch, used, tile_size, dense_from, reference_len))
            batch, used, longest, tiles = [], 0, need, 0
        tiles += most_tiles
        batch.append(segment._replace(offset=used))
        used += need
    if batch:
        waves.append(_wave(batch, used, tile_size, dense_from, reference_len))
    pairs = tuple(
        causal_pairs(q, s) if i in attended else 0 for i, (q, s) in enumerate(zip(query_lens, seq_lens, strict=True))
    )
    return StepPlan(tuple(waves), chosen, len(query_lens), num_rankings, pairs)


def _wave(
    segments: list[Segment],
    num_slots: int,
    tile_size: int,
    dense_from: Sequence[int] | None,
    reference_len: int | None,
) -> Wave:
    tiles: list[Tile] = []
    for index, segment in enumerate(segments):
        first_dense = dense_from[segment.seq] if dense_from else None
        tiles += split_tiles(index, segment, tile_size, first_dense, reference_len)
    tiles.sort(key=lambda tile: tile.share > 0)  # dense ones: they take longest, whatever sequences come after theirs
    return Wave(tuple(segments), tuple(tiles), num_slots, max(s.history for s in segments))
