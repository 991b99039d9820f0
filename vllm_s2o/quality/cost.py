"""What a config costs a model: error and density of each layer, and how far the next tokens move.

The model runs twice in transformers, once dense and once with sparse attention in every layer that the config makes
sparse. The second run's errors add up from layer to layer, as they do in a server; a layer's own error is that of its
attention on what enters it there, against dense attention on the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vllm_s2o import prefill_attention
from vllm_s2o.config import ResolvedConfig
from vllm_s2o.params import S2OParams
from vllm_s2o.quality.capture import Layer, dense_attention, last_states

PAGE = 16
"""Tokens of a page, as in vLLM."""

POSITIONS = 256
"""Whose logits exist at a time."""


class CostError(RuntimeError):
    """Why there is nothing to measure, in one sentence."""


class LayerCost(NamedTuple):
    """One layer on one prompt."""

    layer: int
    density: float
    """Visited / causal pairs; 1 where the config keeps the layer dense."""
    rel_error: float
    """Mean squared difference from dense attention, relative to the mean square of that; 0 where it is dense."""


class Cost(NamedTuple):
    """A config on one prompt, or the mean over several."""

    density: float
    """Over all layers, dense ones included."""
    rel_error: float
    """The mean over the sparse layers."""
    agreement: float
    """Share of the positions with the same most probable next token."""
    kl: float
    """Mean divergence of the next token's distribution from dense attention's, in nats."""
    perplexity: float
    dense_perplexity: float
    """Of the prompt's own next tokens, with S2O and without."""


def paged(rows: torch.Tensor) -> torch.Tensor:
    """Keys or values of a prompt as pages that lie in order, [pages, PAGE, ...]: a slot is then a position."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % PAGE, *rows.shape[1:])]).unflatten(0, (-1, PAGE))


def sparse_attention(layer: Layer, params: S2OParams, ends: Sequence[int] = ()) -> tuple[torch.Tensor, float]:
    """One layer's S2O attention over a whole prompt, at once or in chunks that end at `ends`, the last one with it.

    Returns:
        [num_tokens, num_heads, head_size], and visited / causal pairs.
    """
    device, ends = layer.query.device, ends or [len(layer.query)]
    key, value = paged(layer.key), paged(layer.value)
    pages = torch.arange(len(key), dtype=torch.int32, device=device)
    # A chunk is a sequence that ends with it: all have the same pages.
    out, stats = prefill_attention(
        layer.query, key, value,
        block_table=pages.expand(len(ends), -1).contiguous(),
        query_start_loc=torch.tensor([0, *ends], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        prompt_lens=[len(layer.query)] * len(ends), scale=layer.scale, params=params, return_stats=True,
    )  # fmt: skip
    return out, (stats.visited_pairs.sum() / stats.causal_pairs.sum()).item()


def sparse_layers(config: ResolvedConfig) -> dict[int, S2OParams]:
    """What the layers that may be sparse run with.

    Raises:
        CostError: the config leaves every layer dense.
    """
    found = {layer: params for layer in range(config.traits.num_layers) if (params := config.layer(layer)) is not None}
    if not found:
        raise CostError(f"{config.source} makes prompts sparse in no layer: there is nothing to measure.")
    return found


def measure(
    model: Any, ids: Sequence[int], config: ResolvedConfig, progress: Callable[[int], object] = lambda layers: None
) -> tuple[Cost, list[LayerCost]]:
    """Run one prompt dense and sparse.

    Args:
        model: one of transformers' causal LMs; afterwards its attention is again what it was.
        ids: the prompt's tokens. What the config does to them is judged whatever its `min_seq_len` is.
        progress: told 1 for each layer of each run.

    Raises:
        CostError: the config leaves every layer dense.
        CaptureError: the model's attention is not plain causal attention.
    """
    sparse = sparse_layers(config)
    layers: list[LayerCost] = []

    def dense(layer: Layer) -> torch.Tensor:
        progress(1)
        return dense_attention(layer)

    def mixed(layer: Layer) -> torch.Tensor:
        progress(1)
        exact = dense_attention(layer)
        if layer.index not in sparse:
            layers.append(LayerCost(layer.index, 1.0, 0.0))
            return exact
        out, density = sparse_attention(layer, sparse[layer.index])
        error = (out.float() - exact.float()).square().mean() / exact.float().square().mean()
        layers.append(LayerCost(layer.index, density, error.item()))
        return out

    kl, agreement, surprise, dense_surprise = next_tokens(
        model, last_states(model, ids, dense), last_states(model, ids, mixed), ids
    )
    errors = [cost.rel_error for cost in layers if cost.layer in sparse]
    cost = Cost(
        density=sum(cost.density for cost in layers) / len(layers), rel_error=sum(errors) / len(errors),
        agreement=agreement, kl=kl, perplexity=math.exp(surprise), dense_perplexity=math.exp(dense_surprise),
    )  # fmt: skip
    return cost, layers


def next_tokens(model: Any, dense: torch.Tensor, sparse: torch.Tensor, ids: Sequence[int]) -> tuple[float, ...]:
    """What two runs of a prompt make of its next tokens.

    Args:
        dense, sparse: last states of the runs, [num_tokens, hidden_size].

    Returns:
        Means over positions: divergence of sparse from dense in nats, share with the same most probable token, and the
        negative log-likelihoods of the prompt's own next tokens, sparse and dense.
    """
    head = model.get_output_embeddings()
    targets = torch.tensor(ids, device=dense.device)[1:]
    totals = torch.zeros(4, dtype=torch.float64, device=dense.device)
    with torch.no_grad():
        for start in range(0, len(ids), POSITIONS):
            exact, other = (
                head(states[start : start + POSITIONS]).float().log_softmax(-1) for states in (dense, sparse)
            )
            totals[0] += (exact.exp() * (exact - other)).sum().double()
            totals[1] += (exact.argmax(-1) == other.argmax(-1)).sum()
            own = targets[start : start + POSITIONS, None]  # the last position has no next token
            totals[2] -= other[: len(own)].gather(1, own).sum().double()
            totals[3] -= exact[: len(own)].gather(1, own).sum().double()
    counts = totals.new_tensor([len(ids), len(ids), len(targets), len(targets)])
    return tuple((totals / counts).tolist())


def mean(costs: Sequence[Cost]) -> Cost:
    """Over prompts of one length; of perplexities the geometric mean, which is that of all tokens together."""
    means = {name: sum(getattr(cost, name) for cost in costs) / len(costs) for name in Cost._fields}
    for name in ("perplexity", "dense_perplexity"):
        means[name] = math.exp(sum(math.log(getattr(cost, name)) for cost in costs) / len(costs))
    return Cost(**means)
