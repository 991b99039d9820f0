"""What a selection rule is: of one query head, which keys each tile of queries visits.

Every rule here, S2O's too, visits the same two parts for a tile of rows [first, end):

    [start, end)   the keys around the diagonal, always and masked causally
    [0, start)     the *history*: whole units of keys, those that the rule picks

so that rules with the same order of the history share everything but the picks. Only the two bounds (`exact.py`) pick
keys for each row by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch


class Head(NamedTuple):
    """Attention inputs of one query head, after RoPE, in fp32."""

    queries: torch.Tensor
    """[tokens, group, size]: of all query heads that share the key."""
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """Which of the group this head is."""
    key: torch.Tensor
    """[tokens, size]"""
    scale: float
    """Factor on the logits."""

    @property
    def query(self) -> torch.Tensor:
        """[tokens, size]"""
        return self.queries[:, self.index]


def heads_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> Iterator[Head]:
    """The heads of a layer in order.

    Args:
        query: [tokens, heads, size]; key: [tokens, kv_heads, size]; any float type.

    Raises:
        ValueError: shapes that do not belong together.
    """
    fits = query.dim() == key.dim() == 3 and len(query) == len(key) and query.shape[2] == key.shape[2]
    if not fits or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query must be [tokens, heads, size] and key [tokens, kv_heads, size] with heads a multiple of kv_heads, "
            f"got {list(query.shape)} and {list(key.shape)}"
        )
    for queries, keys in zip(query.float().chunk(key.shape[1], 1), key.float().unbind(1), strict=True):
        for index in range(queries.shape[1]):
            yield Head(queries, index, keys.contiguous(), scale)


class Tile(NamedTuple):
    """Query rows [first, end)."""

    first: int
    end: int


class Layout(NamedTuple):
    """How a tile's keys lie: always visited from `start` on, the history before it in units."""

    start: int
    order: torch.Tensor | None
    """[start] positions of the history in the order in which units are cut from it; None: as it is."""
    unit: int
    """Keys in one unit; the last one may be shorter."""
    computed: int
    """Keys from `start` on that a kernel multiplies each row with, those that it masks included."""

    @property
    def num_units(self) -> int:
        return -(-self.start // self.unit)


class Rule(ABC):
    """A selection rule that takes one parameter, its looseness."""

    tile: int
    """Query rows that are selected for together."""
    values: tuple[float, ...]
    """The parameter's values that a sweep takes, from many keys to few."""

    @abstractmethod
    def select(self, head: Head, value: float) -> torch.Tensor:
        """The oracle: keys visited by each tile, [tiles, tokens] bool, before causality is applied; by each row,
        [tokens, tokens], where the rule picks for each row."""


class UnitRule(Rule):
    """A rule that picks whole units of the history."""

    @property
    @abstractmethod
    def layouts(self) -> Hashable:
        """Rules for which this is equal have the same layouts for every head and tile."""

    @abstractmethod
    def bind(self, head: Head) -> "UnitSelection":
        """What the rule knows of a head before it looks at single tiles."""


class UnitSelection(ABC):
    """A rule on one head, all values of its parameter at a time."""

    @abstractmethod
    def layout(self, tile: Tile) -> Layout: ...

    @abstractmethod
    def picks(self, tile: Tile, inside: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Units picked at each value, [values, units] bool.

        Args:
            inside: [rows], the softmax mass of the keys that are always visited, up to a factor for each row.
            units: [units, rows], that of each unit of the history, with the same factors. A rule that works online
                may look only at what it has visited before.
        """


def tiles_of(num_tokens: int, tile: int) -> list[Tile]:
    return [Tile(first, min(first + tile, num_tokens)) for first in range(0, num_tokens, tile)]


def as_tensor(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
