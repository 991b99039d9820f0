"""Attention problems captured from a model, and the parameters that its shipped config has for them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from inputs import Problem, Shape, in_pages

from vllm_s2o import S2OParams
from vllm_s2o.config import load_config
from vllm_s2o.quality.capture import Capture, CaptureError, Layer


def captured_problems(captured: Capture, device: torch.device) -> Iterator[tuple[Problem, S2OParams | None]]:
    """A problem per layer, and what the shipped config runs the layer with; None where it stays dense."""
    config = load_config(captured.traits)
    for layer in captured.layers:
        yield captured_problem(captured, layer, device), config.layer(layer.index)


def captured_problem(captured: Capture, layer: Layer, device: torch.device) -> Problem:
    """One layer's problem, without the tokens that fill no page.

    Raises:
        CaptureError: not one page is full.
    """
    traits = captured.traits
    _, num_heads, head_size = layer.query.shape
    shape = Shape(name(captured, layer), num_heads, layer.key.shape[1], head_size)
    num_tokens = captured.num_tokens // shape.page * shape.page
    if not num_tokens:
        raise CaptureError(f"{captured.num_tokens} tokens of {traits.name} do not fill a page of {shape.page}.")
    query, key, value = (t[:num_tokens].to(device) for t in (layer.query, layer.key, layer.value))
    # Not every provider can be told another scale than the usual one: the query takes it.
    if layer.scale != head_size**-0.5:
        query = query * (layer.scale * head_size**0.5)
    return in_pages(shape, query, key, value, torch.Generator(device=device).manual_seed(0))


def name(captured: Capture, layer: Layer) -> str:
    """Model, layer, text and YaRN: in a table, all rows of one name are of one model on one text."""
    model = Path(captured.traits.name).resolve().name  # of a hub's ORGANISATION/NAME, too
    yarn = "" if captured.rope_factor == 1 else f" with YaRN x{captured.rope_factor:g}"
    return f"{model} layer {layer.index} (captured from {Path(captured.text).name}{yarn})"
