"""A model on one prompt with S2O: what each layer and head visits and errs, and rows of one head to be drawn.

The model runs once, in transformers. Layers that the config makes sparse run S2O and hand on what it computes, as in a
server and as in `quality.cost`; each is judged against dense attention on what enters it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_s2o import plan
from vllm_s2o.attention import device_thresholds, plan_step, run_wave, to_device
from vllm_s2o.cli.diagnosis import ranges
from vllm_s2o.config import ResolvedConfig
from vllm_s2o.kernels import naive
from vllm_s2o.params import S2OParams
from vllm_s2o.quality.capture import Layer, Source, dense_attention, last_states, open_model
from vllm_s2o.quality.cost import PAGE, paged


class ReportError(RuntimeError):
    """Why there is nothing to draw, in one sentence."""


class Tile(NamedTuple):
    """A tile of the drawn head: rows that stop together."""

    positions: torch.Tensor
    """[rows]: of its queries."""
    start: int
    """Where its segment begins: also the length of the history."""
    ranking: torch.Tensor
    """[start]: positions of the history's keys, most important first. Tiles of a segment share it."""
    visited: int
    """How many of them, from the first on, were visited."""


class HeadVisits(NamedTuple):
    """What one head visits."""

    query: torch.Tensor
    """[num_tokens, head_size] fp32"""
    key: torch.Tensor
    """The keys that it shares."""
    scale: float
    segment_len: int
    tiles: list[Tile]
    """By position."""


class LayerFigures(NamedTuple):
    """One layer: by query head, and as a whole."""

    layer: int
    sparse: bool
    densities: list[float]
    """Visited / causal pairs; 1 where the config keeps the layer dense."""
    errors: list[float]
    """Mean squared difference from dense attention, relative to the mean square of that; 0 where it is dense."""
    density: float
    rel_error: float


def sparse_layers(config: ResolvedConfig) -> list[int]:
    return [layer for layer in range(config.traits.num_layers) if config.layer(layer) is not None]


def chosen_layer(config: ResolvedConfig, layer: int | None, head: int) -> int:
    """The layer to draw: the one that is asked for, or that in the middle of the sparse ones.

    Raises:
        ReportError: there is no such layer or head, or the config keeps it dense.
    """
    traits, sparse = config.traits, sparse_layers(config)
    if not sparse:
        raise ReportError(f"{config.source} makes no layer of {traits.name} sparse: there is nothing to draw.")
    for what, given, count in (("layer", layer, traits.num_layers), ("head", head, traits.num_heads)):
        if given is not None and not 0 <= given < count:
            raise ReportError(f"There is no {what} {given}: {traits.name} has {what}s 0 to {count - 1}.")
    if layer is not None and layer not in sparse:
        raise ReportError(f"{config.source} keeps layer {layer} dense: sparse ones are {ranges(sparse)}.")
    return sparse[len(sparse) // 2] if layer is None else layer


def read_text(model: str, text: str, num_tokens: int) -> tuple[Source, list[int]]:
    """A model and the beginning of a text, as `quality.text` knows them.

    Raises:
        CaptureError: there is no such model or text, or it is too short.
    """
    source = open_model(model, num_tokens)
    return source, source.prompt(text, num_tokens)


def read_prompt(model: str, path: Path, num_tokens: int | None) -> tuple[Source, list[int]]:
    """A model and a file's tokens, or the first ones of them.

    Raises:
        CaptureError: there is no such model; ReportError: no such file, or it is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ReportError(f"The prompt {path} is no UTF-8 file.") from None
    except OSError as error:
        raise ReportError(f"The prompt {path} cannot be read: {error.strerror}.") from None
    # How long the prompt is, and so whether the context must be extended, is known when it is in tokens.
    ids = open_model(model, 1).tokenizer(text, verbose=False).input_ids
    if len(ids) < (num_tokens or 1):
        raise ReportError(f"The prompt {path} has {len(ids)} tokens, fewer than {num_tokens or 1}.")
    ids = ids[:num_tokens]
    return open_model(model, len(ids)), ids


def check_length(config: ResolvedConfig, num_tokens: int) -> None:
    """Raises ReportError where the config leaves prompts of this length dense."""
    if num_tokens < config.min_seq_len:
        raise ReportError(
            f"The prompt has {num_tokens} tokens, and {config.source} makes prompts sparse from min_seq_len="
            f"{config.min_seq_len} on: give a longer one, or another minimum with "
            '--additional-config \'{"s2o": {"min_seq_len": N}}\'.'
        )


def measure(
    model: Any, ids: Sequence[int], config: ResolvedConfig, layer: int, head: int,
    progress: Callable[[int], object] = lambda layers: None,
) -> tuple[list[LayerFigures], HeadVisits]:  # fmt: skip
    """Run a prompt with S2O.

    Args:
        model: one of transformers' causal LMs; afterwards its attention is again what it was.
        ids: the prompt's tokens.
        layer, head: whose rows are wanted; a layer that the config makes sparse.
        progress: told 1 for each layer.

    Raises:
        CaptureError: the model's attention is not plain causal attention.
    """
    figures: list[LayerFigures] = []
    drawn: list[HeadVisits] = []

    def attend(given: Layer) -> torch.Tensor:
        exact = dense_attention(given)
        params = config.layer(given.index)
        if params is None:
            heads = config.traits.num_heads
            figures.append(LayerFigures(given.index, False, [1.0] * heads, [0.0] * heads, 1.0, 0.0))
            out = exact
        else:
            out, visited, tiles = run_layer(given, params, head if given.index == layer else None)
            figures.append(_judged(given.index, out, exact, visited))
            if tiles is not None:
                kv_head = head * given.key.shape[1] // given.query.shape[1]
                drawn.append(
                    HeadVisits(
                        given.query[:, head].float().cpu(), given.key[:, kv_head].float().cpu(), given.scale,
                        params.segment_len, tiles,
                    )
                )  # fmt: skip
        progress(1)
        return out

    last_states(model, ids, attend)
    return figures, drawn[0]


def _judged(layer: int, out: torch.Tensor, exact: torch.Tensor, visited: torch.Tensor) -> LayerFigures:
    causal = plan.causal_pairs(len(out), len(out))
    squares = (out.float() - exact.float()).square().mean((0, 2))
    whole = exact.float().square().mean((0, 2))
    densities = visited.double() / causal
    return LayerFigures(
        layer, True, densities.tolist(), (squares / whole).tolist(),
        densities.mean().item(), (squares.mean() / whole.mean()).item(),
    )  # fmt: skip


def run_layer(
    layer: Layer, params: S2OParams, head: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[Tile] | None]:
    """`attention.run` of a layer's whole prompt, keeping what that lets go of: each tile's visits.

    Returns:
        [num_tokens, num_heads, head_size]; visited pairs of each head, [num_heads] int64; tiles of `head`, if given.
    """
    num_tokens, num_heads = layer.query.shape[:2]
    device, num_kv_heads = layer.query.device, layer.key.shape[1]
    query, key, value = layer.query.contiguous(), paged(layer.key), paged(layer.value)
    # Pages in order: a slot is a position.
    block_table = torch.arange(-(-num_tokens // PAGE), dtype=torch.int32, device=device)[None]
    (thresholds,) = device_thresholds([(params, num_heads)], device)
    out = torch.empty_like(query)
    total = torch.zeros(num_heads, dtype=torch.int64, device=device)
    tiles: list[Tile] = []
    num_rankings = params.num_rankings(num_heads, num_kv_heads)
    for tables in to_device(plan_step([num_tokens], [num_tokens], params, num_rankings), device).waves:
        slots, pairs = run_wave(query, key, value, block_table, tables, params, layer.scale, out, thresholds)
        total += pairs.long().sum(0)
        if head is not None:
            ranking = head * num_rankings // num_heads
            tiles += _tiles(tables.wave, slots.cpu(), pairs[:, head].tolist(), ranking)
    return out, total, sorted(tiles, key=lambda tile: tile.start) if head is not None else None


def _tiles(wave: plan.Wave, slots: torch.Tensor, pairs: list[int], ranking: int) -> list[Tile]:
    rankings = [naive.ranking_of(slots, list(segment), ranking) for segment in wave.segments]
    found = []
    # Waves have their dense tiles first.
    for tile, visited in sorted(zip(wave.tiles, pairs, strict=True), key=lambda both: both[0].first):
        segment = wave.segments[tile.segment]
        positions = segment.query_pos + torch.arange(tile.first, tile.first + tile.rows)
        inside = int((positions - segment.history + 1).sum())
        history = (visited - inside) // tile.rows  # the same for all rows of a tile
        found.append(Tile(positions, segment.history, rankings[tile.segment].long(), history))
    return found
