"""What one layer's sparse prefill runs with."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

NOT_WHOLE_TILES = "segment_not_whole_tiles"
"""Type of the one error that concerns two fields: whoever has only one of them cannot judge it."""

Power = Literal[16, 32, 64, 128]
Threshold = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]


class S2OParams(BaseModel):
    """Parameters of `prefill_attention`. The defaults were chosen by hand, not searched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Threshold | Annotated[tuple[Threshold, ...], Field(min_length=1)] = Field(
        0.02,
        description="tau, from 0 up to but not including 1: a tile stops once a key block adds less than this share "
        "to its softmax mass. 0 never stops and equals dense attention. One value, or one per query head.",
    )
    reference_len: int | None = Field(
        None, ge=1, le=2**24, strict=True,
        description="Keys before a segment for which the threshold holds; after more of them it falls in proportion, "
        "so that what all the blocks left out may hold together does not grow with a prompt's length. null: one "
        "threshold for all lengths.",
    )  # fmt: skip
    segment_len: int = Field(
        512, ge=1, le=65536, strict=True,
        description="Queries that share a ranking of the keys before them; a multiple of tile_size.",
    )  # fmt: skip
    tile_size: Power = Field(128, description="Query rows that stop together.")
    key_block: Power = Field(64, description="History keys visited in one step of the online softmax.")
    stop_interval: int = Field(
        2, ge=1, le=64, strict=True,
        description="Key blocks before the first test of the stop rule, and the least between two; a step grows to a "
        "quarter of what was visited. The gain is the mean of its blocks.",
    )  # fmt: skip
    dense_tail: int = Field(
        128, ge=0, le=65536, strict=True,
        description="Tokens at a prompt's end that attend to all keys, with the tile that they begin in: the answer is "
        "read from them, and each of them asks for something else.",
    )  # fmt: skip
    num_classes: Power = Field(32, description="Importance classes that the keys are ranked into.")
    ranking: Literal["query_head", "kv_head"] = Field(
        "query_head",
        description="What has a ranking of its own: each query head, or each KV head, whose query heads share it. "
        "The latter is ranked sooner, and errs more at equal density: most of all beyond a model's context, where "
        "heads look for different keys.",
    )  # fmt: skip
    budget: float | None = Field(
        None, gt=0, le=1, strict=True, allow_inf_nan=False,
        description="Fixed share of the history to visit, without a stop rule, beside dense_tail; for benchmarks and "
        "debugging only.",
    )  # fmt: skip

    @field_validator("tile_size", "key_block", "num_classes", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be one of 16, 32, 64 and 128")
        return value

    @model_validator(mode="after")
    def _whole_tiles(self) -> Self:
        if self.segment_len % self.tile_size:
            raise PydanticCustomError(
                NOT_WHOLE_TILES,
                "segment_len={segment_len} must be a multiple of tile_size={tile_size}",
                {"segment_len": self.segment_len, "tile_size": self.tile_size},
            )
        return self

    def num_rankings(self, num_heads: int, num_kv_heads: int) -> int:
        """Of one history."""
        return num_heads if self.ranking == "query_head" else num_kv_heads

    def thresholds(self, num_heads: int) -> tuple[float, ...]:
        """One threshold per query head.

        Raises:
            ValueError: the list of thresholds has another length.
        """
        if not isinstance(self.threshold, tuple):
            return (self.threshold,) * num_heads
        if len(self.threshold) != num_heads:
            raise ValueError(f"threshold lists {len(self.threshold)} heads, the query has {num_heads}")
        return self.threshold


def threshold_range(layers: Iterable[S2OParams]) -> str:
    """`0.02`, or `0..0.05` where layers or heads differ."""
    values = [v for p in layers for v in (p.threshold if isinstance(p.threshold, tuple) else (p.threshold,))]
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"
