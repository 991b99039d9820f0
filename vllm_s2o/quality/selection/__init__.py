"""Which keys each method of sparse prefill visits, S2O and others: `rule.py` says what a rule is.

ranked.py   S2O and its variants
blocks.py   PBS-Attn, block means, FlashPrefill, XAttention, FlexPrefill
exact.py    two bounds: each row's heaviest keys
"""

from collections.abc import Callable

from . import ranked
from .blocks import PBS, BlockMean, FlashPrefill, FlexPrefill, XAttention
from .exact import RowRule, TopK, TopP
from .ranked import S2O
from .rule import Head, Rule, Tile, UnitRule, heads_of, tiles_of

__all__ = ["METHODS", "S2O", "Head", "RowRule", "Rule", "Tile", "UnitRule", "heads_of", "method", "tiles_of"]

METHODS: dict[str, Callable[[], Rule]] = {
    "pbs": PBS,
    "block_mean": BlockMean,
    "flashprefill": FlashPrefill,
    "flashprefill_bare": lambda: FlashPrefill(sink=1, window=1, full=0),
    "xattention": XAttention,
    "flexprefill": FlexPrefill,
    "top_k": TopK,
    "top_p": TopP,
}
"""Rules beside S2O's. FlashPrefill is there as released, and without the blocks that it visits whatever their score:
at 8K tokens they alone are a fifth of all pairs."""


def method(name: str) -> Rule:
    """A rule by its name: one of METHODS, or a variant of S2O (`ranked.named`).

    Raises:
        ValueError: there is none.
    """
    if name in METHODS:
        return METHODS[name]()
    try:
        return ranked.named(name)
    except ValueError as error:
        raise ValueError(f"{error} Others are {', '.join(METHODS)}.") from None
