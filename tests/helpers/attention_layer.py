"""One layer's attention inputs with the stripes of real maps: few keys draw most of the mass, and near ones more."""

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    query: torch.Tensor
    """[tokens, heads, size]"""
    key: torch.Tensor
    """[tokens, kv_heads, size]"""
    value: torch.Tensor
    scale: float

    @property
    def causal(self) -> torch.Tensor:
        """[tokens, tokens] bool"""
        return torch.ones(len(self.key), len(self.key), dtype=torch.bool).tril()

    def weights(self, head: int) -> torch.Tensor:
        """One head's whole softmax, [tokens, tokens]."""
        key = self.key[:, head * self.key.shape[1] // self.query.shape[1]]
        logits = self.query[:, head] @ key.T * self.scale
        return logits.masked_fill(~self.causal, -torch.inf).softmax(-1)

    def values_of(self, head: int) -> torch.Tensor:
        """[tokens, size]"""
        return self.value[:, head * self.key.shape[1] // self.query.shape[1]]


def make_inputs(tokens: int, num_heads: int = 4, num_kv_heads: int = 2, head_size: int = 32, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key = normal(tokens, num_heads, head_size), normal(tokens, num_kv_heads, head_size)
    stripes = torch.nn.functional.normalize(normal(3, num_kv_heads, head_size), dim=-1)
    # Three kinds of stripes, each sought by queries of another part of the prompt more than by those of the rest.
    for kind, direction in enumerate(stripes):
        heavy = (torch.rand(tokens, num_kv_heads, generator=generator) ** 12)[..., None]
        sought = 3 + 5 * torch.sin(torch.arange(tokens) / tokens * 6 + 2 * kind).clamp(min=0)[:, None, None]
        key += 8 * heavy * direction
        query += sought * direction.repeat_interleave(num_heads // num_kv_heads, 0)
    # Neighbours look alike, as RoPE makes them.
    angle = torch.arange(tokens)[:, None, None] / 12
    near = torch.cat([angle.cos(), angle.sin()], -1)
    query[..., :2] += 4 * near
    key[..., :2] += 4 * near
    key[0] *= 2  # the first token draws mass from everywhere
    return Inputs(query, key, normal(tokens, num_kv_heads, head_size), head_size**-0.5)
