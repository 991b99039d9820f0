"""One head's attention as two pictures with a line for each drawn query: keys by position, and as S2O visits them.

A column stands for some neighbouring keys, and a pixel for the share of its query's attention that they get: a line
sums to 1. In the second picture the own segment of a query comes first, then the history in its ranking:

    before   |key 0 ............... the query|                  causality ends the line
    after    |own segment     |most important ... least|        S2O stops somewhere in the ranking

Attention is exact in both: what lies behind the stop is what S2O leaves out.
"""

from typing import NamedTuple

import torch

from .capture import HeadVisits
from .png import CLEAR, SHADES

PIXELS = 512
"""Lines and columns, at most."""

LEAST, MOST = 1e-4, 1.0
"""Shares that have the first and the last shade; the scale between is logarithmic."""


class Stop(NamedTuple):
    """A tile in the second picture."""

    lines: int
    """How many of its rows are drawn."""
    start: int
    visited: int
    """Keys of its history, which begins at column `segment_len` and is `start` long."""


class Maps(NamedTuple):
    """Both pictures; a share is NaN where there is no key."""

    before: torch.Tensor
    """[lines, columns], by position of the query, as in the other."""
    after: torch.Tensor
    num_tokens: int
    segment_len: int
    keys: int
    """Keys of a column."""
    extent: int
    """Keys that all columns stand for."""
    stops: list[Stop]
    """Of tiles by position."""
    kept: float
    """Mean over lines: the share of a query's attention that the visited keys get."""


def draw(head: HeadVisits, pixels: int = PIXELS) -> Maps:
    """Both pictures of one head."""
    num_tokens = len(head.query)
    every = -(-num_tokens // pixels)
    # As wide as the longest line of the second picture, the first one at the same scale.
    extent = max(head.segment_len + tile.start for tile in head.tiles)
    keys = -(-extent // pixels)
    columns = -(-extent // keys)
    before, after, stops, kept = [], [], [], []
    seen = 0
    for tile in head.tiles:
        chosen = tile.positions[(every // 2 - seen) % every :: every]
        seen += len(tile.positions)
        stops.append(Stop(len(chosen), tile.start, tile.visited))
        if not len(chosen):
            continue
        weights = exact(head, chosen)
        visits = torch.empty(num_tokens, dtype=torch.long)
        visits[tile.ranking] = head.segment_len + torch.arange(tile.start)
        inside = torch.arange(tile.start, num_tokens)
        visits[tile.start :] = (inside - tile.start).clamp(max=extent - 1)
        here = torch.arange(num_tokens).clamp(max=extent - 1)
        visible = torch.arange(num_tokens) <= chosen[:, None]
        before.append(_pooled(weights, visible, here // keys, columns))
        after.append(_pooled(weights, visible, visits // keys, columns))
        taken = torch.ones(num_tokens, dtype=torch.bool)
        taken[tile.ranking[tile.visited :]] = False
        kept.append(weights[:, taken].sum(1))
    return Maps(
        torch.cat(before), torch.cat(after), num_tokens, head.segment_len, keys, extent, stops,
        torch.cat(kept).mean().item(),
    )  # fmt: skip


def exact(head: HeadVisits, positions: torch.Tensor) -> torch.Tensor:
    """Softmax weights of some queries over all keys, [queries, num_tokens]."""
    logits = head.query[positions] @ head.key.T * head.scale
    after = torch.arange(len(head.key)) > positions[:, None]
    return logits.masked_fill_(after, -torch.inf).softmax(1)


def _pooled(weights: torch.Tensor, visible: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
    """Sums of neighbouring keys; NaN where no key is visible."""
    sums = torch.zeros(len(weights), columns).index_add_(1, column, weights)
    counts = torch.zeros(len(weights), columns).index_add_(1, column, visible.float())
    return sums.masked_fill_(counts == 0, torch.nan)


def shades(shares: torch.Tensor) -> list[bytes]:
    """Pixels of a picture, CLEAR where there is no key."""
    scale = torch.log(torch.tensor(MOST / LEAST))
    place = torch.log(shares.clamp(LEAST, MOST) / LEAST) / scale
    found = (1 + place * (SHADES - 1)).round().nan_to_num(CLEAR).to(torch.uint8)
    return [bytes(row) for row in found.tolist()]
