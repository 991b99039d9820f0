"""Other methods' rules: whole blocks of keys, picked by cheap scores.

Each is its paper's rule where the paper is precise, and else what the released code does, with which
`tests/quality/test_released_rules.py` compares. Shared words: a *block* is `block` neighbouring queries or keys, scores
are [query blocks, key blocks], and blocks after the diagonal are never visited.
"""

import math
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import torch

from .rule import Head, Layout, Tile, UnitRule, UnitSelection

SHARES = (
    0.9999,
    0.999,
    0.997,
    0.99,
    0.98,
    0.97,
    0.95,
    0.92,
    0.9,
    0.85,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.1,
    0.05,
    0.01,
)
"""Of a score's sum, to be covered."""


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[tokens, ...] -> [blocks, block, ...], filled up with zeros."""
    missing = -len(x) % block
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]).unflatten(0, (-1, block))


def means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Mean over the tokens of each block, [blocks, size]."""
    counts = (len(x) - torch.arange(0, len(x), block, device=x.device)).clamp(max=block)
    return in_blocks(x, block).sum(1) / counts[:, None]


def before(num_blocks: int, device: torch.device, offset: int = 0) -> torch.Tensor:
    """Key blocks at least `offset` blocks before a query block's own, [query blocks, key blocks] bool."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril(-offset)


def covering(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest blocks of each row whose scores sum to `share`: none where all of them do not."""
    ranked, places = scores.sort(dim=-1, descending=True)
    reached = ranked.cumsum(-1) >= share
    enough_before = torch.nn.functional.pad(reached[..., :-1], (1, 0), value=False)
    taken = ~enough_before & reached.any(-1, keepdim=True)
    return torch.zeros_like(taken).scatter(-1, places, taken)


class BlockRule(UnitRule):
    """Blocks of the keys as they come; the block on the diagonal is always visited."""

    values: tuple[float, ...] = SHARES

    def __init__(self, block: int = 128):
        self.tile = self.block = block

    @property
    def layouts(self) -> Hashable:
        return "blocks", self.block

    @abstractmethod
    def scores(self, head: Head) -> Any:
        """What is computed once, whatever the looseness: for `chosen`."""

    @abstractmethod
    def chosen(self, scores: Any, value: float) -> torch.Tensor:
        """[query blocks, key blocks] bool; what it says of blocks after the diagonal is ignored."""

    def blocks(self, head: Head, value: float) -> torch.Tensor:
        """Blocks that are visited, [query blocks, key blocks] bool."""
        chosen = self.chosen(self.scores(head), value)
        eye = torch.eye(len(chosen), dtype=torch.bool, device=chosen.device)
        return (chosen | eye) & before(len(chosen), chosen.device)

    def select(self, head: Head, value: float) -> torch.Tensor:
        return self.blocks(head, value).repeat_interleave(self.block, 1)[:, : len(head.key)]

    def bind(self, head: Head) -> UnitSelection:
        scores = self.scores(head)
        return _Blocks(torch.stack([self.chosen(scores, value) for value in self.values]), self.block)


class _Blocks(UnitSelection):
    def __init__(self, chosen: torch.Tensor, block: int):
        self.chosen, self.block = chosen, block

    def layout(self, tile: Tile) -> Layout:
        return Layout(tile.first, None, self.block, self.block)

    def picks(self, tile: Tile, inside: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        return self.chosen[:, tile.first // self.block, : len(units)]


class BlockMean(BlockRule):
    """Blocks whose mean keys cover a share of the softmax with the block's mean query; and the first one.

    The plainest block-sparse rule; PBS-Attn (arXiv 2510.21270) compares with it under the name MeanPooling.
    """

    def scores(self, head: Head) -> torch.Tensor:
        pooled, keys = (in_blocks(x, self.block).mean(1) for x in (head.query, head.key))
        visible = before(len(keys), keys.device)
        return (pooled @ keys.T * head.scale).masked_fill(~visible, -math.inf).softmax(-1)

    def chosen(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        chosen = covering(scores, value)
        chosen[:, 0] = True
        return chosen


class FlashPrefill(BlockRule):
    """Blocks whose score is at least `alpha` times the best one's (FlashPrefill,
    arXiv 2603.06199).

    A block's score is the sum, over the queries of the tile that see all of it, of the exponential of their logits with
    its mean key. Always visited are the first `sink` blocks, the last `window` ones up to the diagonal, and everything
    by the last `full` blocks of queries: as released, a fifth of all pairs at 8,192 tokens.
    """

    values = (0.0, 1e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)

    def __init__(self, block: int = 128, sink: int = 2, window: int = 4, full: int = 2):
        super().__init__(block)
        self.sink, self.window, self.full = sink, window, full

    def scores(self, head: Head) -> torch.Tensor:
        logits = in_blocks(
            head.query @ means(head.key, self.block).T * head.scale, self.block
        )  # [blocks, rows, blocks]
        rows = in_blocks(torch.arange(len(head.key), device=logits.device), self.block)
        last = torch.arange(1, len(logits) + 1, device=logits.device) * self.block - 1
        logits = logits.masked_fill(rows[..., None] < last, -math.inf)
        best = logits.amax((1, 2), keepdim=True)
        return (logits - torch.where(best == -math.inf, 0.0, best)).exp().sum(1)

    def chosen(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        block = torch.arange(len(scores), device=scores.device)
        near = block[:, None] - block < self.window
        chosen = scores >= value * scores.amax(-1, keepdim=True)
        return chosen | near | (block < self.sink) | (block >= len(scores) - self.full)[:, None]


class XAttention(BlockRule):
    """Blocks that cover a share of antidiagonal sums (XAttention, arXiv 2503.16428).

    The map is cut into squares of `stride`; a square stands for the mean of its antidiagonal, the rows of squares are
    normalised by a softmax, and a block's score is the sum of its squares. The first block and the one on the diagonal
    are always visited and count towards the share. The released code writes the diagonal over the first block where one
    chunk of the prompt holds both: there it forces the diagonal alone, and takes one block more than the share needs.
    """

    def __init__(self, block: int = 128, stride: int = 8):
        super().__init__(block)
        self.stride = stride

    def scores(self, head: Head) -> torch.Tensor:
        # Query i of a group meets key `stride - 1 - i`: one product of the groups written as long rows.
        queries = in_blocks(head.query, self.stride).flip(1).flatten(1)
        keys = in_blocks(head.key, self.stride).flatten(1)
        visible = before(len(keys), keys.device)
        squares = (queries @ keys.T * (head.scale / self.stride)).masked_fill(~visible, -math.inf).softmax(-1)
        rows = in_blocks(squares, self.block // self.stride).sum(1)
        return in_blocks(rows.T, self.block // self.stride).sum(1).T

    def chosen(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        forced = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        forced[:, 0] = True
        required = value * scores.sum(-1, keepdim=True)
        already = (scores * forced).sum(-1, keepdim=True)
        ranked, places = scores.masked_fill(forced, 0).sort(dim=-1, descending=True)
        taken = already + ranked.cumsum(-1) - ranked < required
        return forced | torch.zeros_like(forced).scatter(-1, places, taken)


class FlexPrefill(BlockRule):
    """Vertical and slash lines of blocks that cover a share `gamma` of the last queries' softmax (FlexPrefill,
    arXiv 2502.20766).

    The last `block` queries see the whole prompt. Their mass by key (vertical) and by distance (slash) says how many
    tokens cover `gamma`; as many blocks' worth of lines are visited, by pooled mass, at least `min_budget` tokens of
    each. Where pooled logits tell the mass by key well (the square root of their Jensen-Shannon divergence is below
    `tau`), lines fall to that minimum and blocks by pooled queries and keys are added. Tokens are turned into lines by
    128, whatever `block` is, as released.
    """

    def __init__(self, block: int = 128, tau: float = 0.1, min_budget: int = 512):
        super().__init__(block)
        self.tau, self.min_budget = tau, min_budget

    def scores(self, head: Head) -> tuple[torch.Tensor, ...]:
        tokens, block = len(head.key), self.block
        last = head.query[-block:] * head.scale
        distance = torch.arange(tokens - len(last), tokens, device=last.device)[:, None] - torch.arange(
            tokens, device=last.device
        )
        weights = (last @ head.key.T).masked_fill(distance < 0, -math.inf).softmax(-1)
        vertical = weights.mean(0)
        # Entry tokens - 1 - d holds distance d; where distances are negative, weights are 0.
        slash = torch.zeros_like(vertical).index_add(
            0, (tokens - 1 - distance).clamp(max=tokens - 1).flatten(), weights.flatten()
        ) / len(last)
        keys = means(head.key, block)
        blocks_of_keys = in_blocks(vertical, block).sum(1)
        pooled = (last.mean(0) @ keys.T).softmax(-1)
        logits = means(head.query, block) @ keys.T * head.scale
        block_map = logits.masked_fill(~before(len(keys), keys.device), -math.inf).softmax(-1)
        return vertical, slash, blocks_of_keys, in_blocks(slash, block).sum(1), pooled, block_map

    def chosen(self, scores: tuple[torch.Tensor, ...], value: float) -> torch.Tensor:
        vertical, slash, by_key, by_distance, pooled, block_map = scores
        count = len(by_key)
        least = min(-(-self.min_budget // self.block), count)
        query_aware = bool(jensen_shannon(pooled, by_key) < self.tau)
        num_vertical, num_slash = (
            least if query_aware else min(max(tokens_covering(mass, value) // 128 + 1, least), count)
            for mass in (vertical, slash)
        )
        by_key, by_distance = by_key.clone(), by_distance.clone()
        by_key[0] = by_distance[-1] = math.inf  # the first keys and the diagonal
        at = torch.arange(count, device=by_key.device)
        lines = torch.isin(at, by_key.topk(num_vertical).indices)
        distances = torch.isin(at, count - 1 - by_distance.topk(num_slash).indices)
        chosen = lines | distances[(at[:, None] - at).clamp(min=0)]
        if query_aware:
            ranked, places = block_map.flatten().sort(descending=True)
            chosen = chosen.flatten()
            chosen[places[ranked.cumsum(0) <= value * count]] = True
            chosen = chosen.view(count, count)
        return chosen


def tokens_covering(mass: torch.Tensor, share: float) -> int:
    """How many of the heaviest tokens it takes to exceed `share`."""
    return int((mass.sort(descending=True).values.cumsum(0) <= share).sum()) + 1


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Square root of the divergence of two distributions; NaN where one of them has a zero."""
    middle = (p + q) / 2
    return (0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum()).sqrt()


class PBS(UnitRule):
    """Blocks of keys that were permuted inside segments (PBS-Attn, arXiv 2510.21270).

    Keys of each whole segment are sorted by the mean softmax weight that the last `block` queries give them, without
    a causal mask; keys after the last whole segment stay. Of the blocks of permuted keys in earlier segments, those are
    visited whose mean keys cover a share of the softmax with the mean query, and the one that holds the first token.
    A tile's own segment is computed whole. As released, one segment or less is left to dense attention.
    """

    values = SHARES

    def __init__(self, block: int = 128, segment: int = 256):
        if segment % block:
            raise ValueError(f"PBS-Attn's segment must be a multiple of its block: {segment} is none of {block}")
        self.tile, self.block, self.segment = block, block, segment

    @property
    def layouts(self) -> Hashable:
        return "pbs", self.block, self.segment

    def permutation(self, head: Head) -> torch.Tensor:
        """Positions of the keys in their new order, [tokens]."""
        tokens = len(head.key)
        whole = tokens // self.segment * self.segment
        order = torch.arange(tokens, device=head.key.device)
        if tokens <= self.segment:
            return order
        weights = (head.query[-self.block :] @ head.key[:whole].T * head.scale).softmax(-1).mean(0)
        sorted_inside = weights.view(-1, self.segment).argsort(dim=-1, descending=True)
        order[:whole] = (sorted_inside + torch.arange(0, whole, self.segment, device=order.device)[:, None]).flatten()
        return order

    def scores(self, head: Head, order: torch.Tensor) -> torch.Tensor:
        """Softmax of mean queries and mean keys over blocks of earlier segments, [query blocks, key blocks]; NaN in the
        first segment."""
        pooled, keys = (in_blocks(x, self.block).mean(1) for x in (head.query, head.key[order]))
        segment = torch.arange(len(keys), device=keys.device) * self.block // self.segment
        earlier = segment < segment[:, None]
        return (pooled @ keys.T * head.scale).masked_fill(~earlier, -math.inf).softmax(-1)

    def chosen(self, scores: torch.Tensor, order: torch.Tensor, value: float) -> torch.Tensor:
        first = int((order == 0).nonzero()) // self.block
        chosen = covering(scores.nan_to_num(0), value)
        chosen[:, first] = True
        return chosen

    def select(self, head: Head, value: float) -> torch.Tensor:
        order = self.permutation(head)
        chosen = self.chosen(self.scores(head, order), order, value)
        segment = torch.arange(len(chosen), device=order.device) * self.block // self.segment
        chosen |= segment == segment[:, None]
        visited = torch.zeros(len(chosen), len(order), dtype=torch.bool, device=order.device)
        visited[:, order] = chosen.repeat_interleave(self.block, 1)[:, : len(order)]
        return visited

    def bind(self, head: Head) -> UnitSelection:
        order = self.permutation(head)
        scores = self.scores(head, order)
        return _Permuted(torch.stack([self.chosen(scores, order, value) for value in self.values]), order, self)


class _Permuted(_Blocks):
    def __init__(self, chosen: torch.Tensor, order: torch.Tensor, rule: PBS):
        super().__init__(chosen, rule.block)
        self.order, self.segment = order, rule.segment

    def layout(self, tile: Tile) -> Layout:
        start = tile.first // self.segment * self.segment
        return Layout(start, self.order[:start], self.block, min(self.segment, len(self.order) - start))
