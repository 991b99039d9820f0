"""Attention problems with the structure of real maps: sinks, a local band, stripes, and heavy keys.

    logit(t, s) = noise + importance of s                       (heavy keys and stripes, for all queries)
                + a sink at the first tokens
                + a bump around s = t, a few hundred tokens wide (the local band)

The bump is made of a few frequencies, as rotary embeddings make it. Importance falls off exponentially, so that no
share of the keys holds all of the mass: how much of it is visited is left to the threshold.
"""

import math
from dataclasses import dataclass, replace

import torch

FREQUENCIES = (1 / 40, 1 / 90, 1 / 200, 1 / 450)
"""Radians per token of the local band."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of one layer's attention and of its paged cache."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    page: int = 16


LLAMA_8B = Shape("llama-3.1-8b", 32, 8, 128)


@dataclass
class Problem:
    """One sequence, all of whose tokens are queries; keys and values are there twice, in order and in pages."""

    shape: Shape
    query: torch.Tensor
    """[num_tokens, num_heads, head_size]"""
    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    """[num_blocks, page, num_kv_heads, head_size]: vLLM 0.32's layout, rows of K and V joined."""
    value_cache: torch.Tensor
    block_table: torch.Tensor
    """[1, num_blocks] int32, shuffled."""
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """What numbers in fp8 are multiplied by to be queries, keys and values."""
    exact: "Problem | None" = None
    """What it was before it was rounded to fp8."""

    @property
    def num_tokens(self) -> int:
        return self.query.shape[0]

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5

    def rows(self) -> torch.Tensor:
        """Sampled rows, on which results are compared with exact attention: the same for every provider."""
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(self.num_tokens, (96,), generator=generator)
        return torch.cat([rows, torch.tensor([0, self.num_tokens - 1])]).sort().values.to(self.query.device)


def make_problem(
    shape: Shape, num_tokens: int, device: torch.device, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Problem:
    """A problem of `num_tokens` tokens, a multiple of the page."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, device=device, generator=generator)

    heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
    group = heads // kv_heads
    basis = torch.linalg.qr(normal(kv_heads, size, 2 + 2 * len(FREQUENCIES))).Q  # [kv_heads, size, features]
    position = torch.arange(num_tokens, device=device, dtype=torch.float32)
    angles = position[:, None] * torch.tensor(FREQUENCIES, device=device) * 2 * torch.pi
    waves = torch.cat([angles.cos(), angles.sin()], 1)  # [tokens, 2 * frequencies]

    # Logits are in nats: a unit along a feature in the query and x in the key give x.
    nats = size**0.5
    importance = -uniform(num_tokens, kv_heads).clamp(min=1e-6).log()  # exponential: mean 1, a long tail
    importance = 1.2 * importance
    stripes = (torch.arange(num_tokens, device=device) % 1009 < 3)[:, None] * 4.0
    sink = (torch.arange(num_tokens, device=device) < 4)[:, None] * 6.0
    features_k = torch.cat(
        [
            (importance + stripes)[..., None],
            sink.expand(-1, kv_heads)[..., None],
            waves[:, None].expand(-1, kv_heads, -1) * 1.2,
        ],
        2,
    )
    key = normal(num_tokens, kv_heads, size) * 0.8
    key += torch.einsum("thf,hdf->thd", features_k, basis) * nats**0.5
    # Heads differ in how sharply they look, and rows a little in what they look for.
    sharp = torch.linspace(0.8, 1.2, heads, device=device)
    features_q = torch.ones(num_tokens, heads, 2, device=device) * sharp[:, None]
    features_q = torch.cat([features_q, waves[:, None] * sharp[:, None]], 2)
    query = normal(num_tokens, heads, size) * 0.8
    for kv_head in range(kv_heads):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        query[:, mine] += torch.einsum("thf,df->thd", features_q[:, mine], basis[kv_head]) * nats**0.5
    value = normal(num_tokens, kv_heads, size)

    return in_pages(shape, query.to(dtype), key.to(dtype), value.to(dtype), generator)


def in_pages(
    shape: Shape, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, generator: torch.Generator
) -> Problem:
    """A problem whose cache holds these keys and values in shuffled pages.

    Args:
        query: [num_tokens, num_heads, head_size], as many tokens as whole pages have.
        key, value: [num_tokens, num_kv_heads, head_size], of the query's dtype and on its device.
        generator: on that device; it shuffles the pages.
    """
    pages, device = query.shape[0] // shape.page, query.device
    table = torch.randperm(pages, device=device, generator=generator)
    joined = (pages, shape.page, shape.num_kv_heads, 2 * shape.head_size)
    memory = torch.empty(joined, dtype=key.dtype, device=device)
    memory[table] = torch.cat([key, value], -1).view(joined)
    key_cache, value_cache = memory.split(shape.head_size, -1)
    return Problem(shape, query, key, value, key_cache, value_cache, table.int()[None])


def in_fp8(problem: Problem) -> Problem:
    """The problem as vLLM hands it over beside caches in fp8 (e4m3): queries too, with one scale each for all of them,
    of all keys and of all values. Keys and values in order keep their type.

    Scales are powers of two, so that 16 bits hold what the numbers stand for: `from_fp8`."""
    largest = torch.finfo(torch.float8_e4m3fn).max

    def rounded(tensor: torch.Tensor) -> tuple[float, torch.Tensor]:
        scale = 2.0 ** math.ceil(math.log2(tensor.abs().max().item() / largest))
        return scale, (tensor.float() / scale).to(torch.float8_e4m3fn)

    of_query, query = rounded(problem.query)
    of_key, key_cache = rounded(problem.key_cache)
    of_value, value_cache = rounded(problem.value_cache)
    key_cache, value_cache = torch.cat([key_cache, value_cache], -1).split(problem.shape.head_size, -1)
    return replace(
        problem, shape=replace(problem.shape, name=f"{problem.shape.name}, fp8"), query=query, key_cache=key_cache,
        value_cache=value_cache, scales=(of_query, of_key, of_value), exact=problem,
    )  # fmt: skip


def from_fp8(problem: Problem) -> Problem:
    """What the numbers of such a problem stand for, in its former type. Keys and values in order are not rounded."""
    assert problem.exact is not None
    dtype = problem.exact.query.dtype
    query, key_cache, value_cache = (
        tensor.to(dtype) * scale
        for tensor, scale in zip(
            (problem.query, problem.key_cache, problem.value_cache), problem.scales, strict=True
        )
    )  # fmt: skip
    key_cache, value_cache = torch.cat([key_cache, value_cache], -1).split(problem.shape.head_size, -1)
    return replace(problem.exact, query=query, key_cache=key_cache, value_cache=value_cache)


def exact_rows(problem: Problem, rows: torch.Tensor) -> torch.Tensor:
    """Dense attention of some rows in fp32, before anything was rounded to fp8: [rows, num_heads, head_size]."""
    problem = problem.exact or problem
    group = problem.shape.num_heads // problem.shape.num_kv_heads
    out = torch.empty(len(rows), problem.shape.num_heads, problem.shape.head_size, device=rows.device)
    visible = torch.arange(problem.num_tokens, device=rows.device)[None, :] <= rows[:, None]
    for head in range(problem.shape.num_heads):
        logits = problem.query[rows, head].float() @ problem.key[:, head // group].float().T * problem.scale
        weights = logits.masked_fill_(~visible, float("-inf")).softmax(1)
        out[:, head] = weights @ problem.value[:, head // group].float()
    return out
