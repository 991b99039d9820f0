"""What a config file holds, and which models it is for."""

import datetime
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vllm_s2o.params import S2OParams, Threshold


@dataclass(frozen=True)
class ModelTraits:
    """What a config file is matched by."""

    name: str
    """As the user gave it; may be a local path."""
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Length = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]


def _upward(given: str) -> str:
    first, last = map(int, given.split("-"))
    if first > last:
        raise ValueError("a range goes upward")
    return given


Range = (
    Annotated[int, Field(ge=0, strict=True)]
    | Annotated[str, Field(pattern=r"^[0-9]{1,6}-[0-9]{1,6}$"), AfterValidator(_upward)]
)
Ranges = Range | Annotated[tuple[Range, ...], Field(min_length=1)]


def ranges(given: Any) -> list[range]:
    """3, "4-7" or a tuple of these, as ranges."""
    parts = given if isinstance(given, tuple) else (given,)
    bounds = [(part, part) if isinstance(part, int) else map(int, part.split("-")) for part in parts]
    return [range(first, last + 1) for first, last in bounds]


DIMENSIONS = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_size")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


class Match(_Strict):
    """The models a file is for: by name, or by architecture and dimensions, so that a local path works."""

    names: tuple[str, ...] = Field((), description="Model names; the last part of a path counts as a name too.")
    architecture: str | None = Field(None, description="The model's class in its config.json.")
    num_layers: Length | None = Field(None, description="Hidden layers.")
    num_heads: Length | None = Field(None, description="Query heads.")
    num_kv_heads: Length | None = Field(None, description="KV heads.")
    head_size: Length | None = Field(None, description="Size of one head.")

    def by_name(self, traits: ModelTraits) -> bool:
        return self._agrees(traits) and traits.name.lower() in [name.lower() for name in self.names]

    def by_last_part(self, traits: ModelTraits) -> bool:
        return self._agrees(traits) and _last_part(traits.name) in [_last_part(name) for name in self.names]

    def by_dimensions(self, traits: ModelTraits) -> bool:
        return self._agrees(traits) and None not in (getattr(self, name) for name in DIMENSIONS)

    def _agrees(self, traits: ModelTraits) -> bool:
        """What the file says of the model is so: another model may have its name."""
        return all(getattr(self, name) in (None, getattr(traits, name)) for name in DIMENSIONS)


class Override(_Strict):
    """A threshold for some layers, or for some query heads of some layers."""

    layers: Ranges = Field(description='Layers of the model: 3, "4-7", or a list of these.')
    heads: Ranges | None = Field(None, description="Query heads of the model, likewise; all if absent.")
    threshold: Threshold | Literal["dense"] = Field(
        description='tau from 0 up to 1, or "dense": the layers run dense attention, or the heads never stop.'
    )


# YAML reads a bare 2026-01-31 as a date.
_Date = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, datetime.date) else given)]


class Provenance(_Strict):
    """Where a file's figures come from."""

    calibrated: bool = Field(False, strict=True, description="Whether the values were searched on this model.")
    source: str = Field("not stated", description="What the values rest on.")
    date: _Date | None = Field(None, description="When they were found.")
    note: str | None = Field(None, description="Anything a user should know.")
    calibration: dict[str, Any] | None = Field(
        None, description="How they were found, and what they reach on text that they were not chosen on, by layer."
    )

    def __str__(self) -> str:
        return ", ".join(text for text in (self.source, self.date, self.note) if text)


class Settings(_Strict):
    """What a file and a user alike can set."""

    min_seq_len: Length = Field(8192, description="Shorter sequences run dense.")
    min_query_len: Length = Field(256, description="Steps with fewer new tokens of a sequence run dense.")
    params: S2OParams = Field(S2OParams(), description="What every layer runs with, if not overridden.")
    layers: tuple[Override, ...] = Field((), description="Overrides; a later one wins.")


class ConfigFile(Settings):
    """One file in configs/, or one that a user names."""

    match: Match = Field(Match(), description="The models this file is for.")
    provenance: Provenance = Field(Provenance(), description="Where the figures come from.")
