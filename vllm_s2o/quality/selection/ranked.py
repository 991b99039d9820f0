"""S2O's rule (arXiv 2602.22575) and its variants: the history in ranked order, until a step gains too little.

A variant differs in how keys are scored, in what they are sorted by, or in how often gains are judged. What
ships is `kernels/naive.py`; `S2O()` with the parameters of an `S2OParams` selects the same.
"""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_s2o.kernels import naive
from vllm_s2o.plan import WHOLE, threshold_share

from .rule import Head, Layout, Tile, UnitRule, UnitSelection, as_tensor, tiles_of

TAUS = (0.0, *(round(2e-4 * 1.55**step, 6) for step in range(20)))
"""Thresholds of a sweep, up to 0.83."""


def query_head(head: Head, segment: slice) -> torch.Tensor:
    """As shipped: mean and spread over the segment's queries of this head."""
    return naive.importance(head.key[: segment.start], head.query[segment])


def kv_head(head: Head, segment: slice) -> torch.Tensor:
    """The same over those of all heads that share the keys: they share a ranking, too."""
    return naive.importance(head.key[: segment.start], head.queries[segment].flatten(0, 1))


def kv_mean(head: Head, segment: slice) -> torch.Tensor:
    """The paper's: one mean over the segment's queries of all heads that share the keys."""
    return head.key[: segment.start] @ head.queries[segment].mean((0, 1))


RANKINGS = {"queryhead": query_head, "kvhead": kv_head, "mean": kv_mean}
"""Scores of a segment's history, [history]: the higher, the earlier. Their names are words of a
method's name, which underscores join."""


@dataclass(frozen=True)
class S2O(UnitRule):
    """S2O with tiles of `tile` rows and key blocks of `key_block` keys; its looseness is the threshold tau."""

    segment: int = 512
    ranking: str = "queryhead"
    interval: int = 2
    """Key blocks before the first test of the stop rule."""
    growing: bool = True
    """As shipped: steps grow with what was visited. Otherwise all have `interval` key blocks."""
    num_classes: int | None = 32
    """Importance classes, inside which keys stay in the order of positions; None: sorted by score."""
    dense_tail: int = 0
    """Tokens at the end whose tiles visit everything."""
    reference_len: int | None = None
    """Keys before a segment for which the thresholds hold: after longer histories they are less."""
    tile: int = 128
    key_block: int = 64
    values: tuple[float, ...] = TAUS

    @property
    def layouts(self) -> Hashable:
        return "s2o", self.segment, self.ranking, self.num_classes, self.key_block

    def order(self, head: Head, start: int) -> torch.Tensor:
        """The history of the segment that begins at `start`, most important keys first: [start] positions."""
        segment = slice(start, min(start + self.segment, len(head.key)))
        if not start:
            return torch.zeros(0, dtype=torch.long, device=head.key.device)
        scores = RANKINGS[self.ranking](head, segment)
        if self.num_classes is None:
            return scores.argsort(descending=True)
        return naive.importance_classes(scores, self.num_classes).to(torch.uint8).argsort(stable=True)

    def share(self, tile: Tile, tokens: int) -> float:
        """What holds of the thresholds in a tile; 0 where it visits everything."""
        if self.dense_tail and tile.end > tokens - self.dense_tail:
            return 0.0
        return threshold_share(tile.first // self.segment * self.segment, self.reference_len) / WHOLE

    def select(self, head: Head, value: float) -> torch.Tensor:
        """Step by step, with the online softmax of the kernels' oracle."""
        tokens = len(head.key)
        tiles = tiles_of(tokens, self.tile)
        visited = torch.zeros(len(tiles), tokens, dtype=torch.bool, device=head.key.device)
        for row, tile in zip(visited, tiles, strict=True):
            order = self.order(head, tile.first // self.segment * self.segment)
            row[len(order) :] = True  # its own segment; what comes after a query is masked by causality
            at = torch.arange(tokens, device=order.device)
            logits = head.query[tile.first : tile.end] @ head.key.T * head.scale
            logits = logits.masked_fill(at > at[tile.first : tile.end, None], -math.inf)
            softmax = naive.Softmax(len(logits), 0, order.device)
            nothing = head.key[:, :0]
            softmax.add(logits[:, len(order) : tile.end], nothing[len(order) : tile.end])
            ends = [end * self.key_block for end in self.step_ends(-(-len(order) // self.key_block))]
            for keys in order.tensor_split(ends[:-1]) if ends else ():
                m, mass = softmax.m, softmax.l
                softmax.add(logits[:, keys], nothing[keys])
                row[keys] = True
                gain = 1 - mass * torch.exp(m - softmax.m) / softmax.l
                gain = gain.nan_to_num(0).clamp(min=0) / -(-len(keys) // self.key_block)
                if gain.max() < value * self.share(tile, tokens):
                    break
        return visited

    def step_ends(self, count: int) -> list[int]:
        """Of a history of `count` key blocks, how many are visited after each step."""
        ends = [0]
        while ends[-1] < count:
            step = naive.step_blocks(ends[-1], self.interval) if self.growing else self.interval
            ends.append(min(ends[-1] + step, count))
        return ends[1:]

    def bind(self, head: Head) -> UnitSelection:
        return _Ranked(self, head)


class _Ranked(UnitSelection):
    def __init__(self, rule: S2O, head: Head):
        self.rule, self.head = rule, head
        self.thresholds = as_tensor(rule.values, head.key)
        self.ranked: tuple[int, torch.Tensor] | None = None
        """Where the last segment begins, and its ranking."""

    def layout(self, tile: Tile) -> Layout:
        rule = self.rule
        start = tile.first // rule.segment * rule.segment
        # Tiles come in order, and those of one segment share its ranking.
        if self.ranked is None or self.ranked[0] != start:
            self.ranked = start, rule.order(self.head, start)
        computed = -(-(tile.end - start) // rule.key_block) * rule.key_block
        return Layout(start, self.ranked[1], rule.key_block, computed)

    def picks(self, tile: Tile, inside: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        thresholds = self.thresholds * self.rule.share(tile, len(self.head.key))
        visited = stops(thresholds, inside, units, self.rule.step_ends(len(units)))
        return torch.arange(len(units), device=units.device) < visited[:, None]


def stops(
    thresholds: torch.Tensor, inside: torch.Tensor, units: torch.Tensor, step_ends: Sequence[int]
) -> torch.Tensor:
    """Key blocks that a tile visits at each threshold, [thresholds] int64: all of them from the same running gains.

    Args:
        inside: [rows], mass of the tile's own segment; units: [key blocks, rows], that of each block in its order.
        step_ends: key blocks visited after each step.
    """
    if not len(units):
        return torch.zeros(len(thresholds), dtype=torch.long, device=units.device)
    running = inside + units.cumsum(0)
    ends = torch.tensor(step_ends, device=units.device)
    after = running[ends - 1]
    before = torch.cat([inside[None], after[:-1]])
    steps = ends.diff(prepend=ends.new_zeros(1))
    gain = (1 - before / after).nan_to_num(0).clamp(min=0) / steps[:, None]
    stopped = gain.amax(1) < thresholds[:, None]
    stopped[:, -1] = True  # at the end of the history
    return ends[stopped.int().argmax(1)]


NUMBERS = {"first": "interval", "every": "interval", "tail": "dense_tail", "ref": "reference_len"}
"""Fields of a rule by the words that set them."""
NUMBERED = re.compile(rf"({'|'.join(NUMBERS)})([1-9][0-9]*)")


def named(name: str, sizes: Sequence[int] = (128, 64)) -> S2O:
    """`s2o_SEGMENT`, then any of a ranking, `firstN` key blocks before the first test, `everyN` key blocks instead of
    growing steps, `sorted` by score, a dense end of `tailN` tokens, and thresholds that hold for `refN` keys.

    Raises:
        ValueError: no such variant.
    """
    prefix, _, rest = name.partition("_")
    segment, *words = rest.split("_")
    known: dict[str, Any] = {"segment": int(segment)} if prefix == "s2o" and segment.isdigit() else {}
    for word in words if known else ():
        if word in RANKINGS:
            known["ranking"] = word
        elif word == "sorted":
            known["num_classes"] = None
        elif numbered := NUMBERED.fullmatch(word):
            kind, number = numbered.groups()
            known |= {NUMBERS[kind]: int(number)} | ({"growing": False} if kind == "every" else {})
        else:
            known = {}
            break
    if not known or not known["segment"] or known["segment"] % sizes[0]:
        raise ValueError(
            f"There is no method {name}: variants of S2O are s2o_SEGMENT, a multiple of {sizes[0]}, followed by any of "
            f"{', '.join(f'_{word}' for word in RANKINGS)}, _firstN (key blocks before the first test), _everyN "
            "(key blocks, not growing), _sorted, _tailN (tokens of a dense end) and _refN (keys for which thresholds "
            "hold)."
        )
    return S2O(**known, tile=sizes[0], key_block=sizes[1])
