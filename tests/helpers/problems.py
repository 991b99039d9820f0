"""Attention problems of any kind, for hypothesis: lengths, heads, layouts, tables, numbers and parameters."""

import os
import random
from dataclasses import dataclass

import torch
from cases import DEVICE, LAYOUTS, Case
from hypothesis import strategies as st

from vllm_s2o import S2OParams

GARBAGE = [-1, -(2**31), 2**31 - 1, 2**30, 0, 3]
HEAD_SIZES = [32, 64, 80, 96, 128, 192, 256]
GROUPS = [1, 2, 3, 4, 8]
PAGES = [1, 8, 16, 32, 128]
KINDS = {
    "tile_size": [16, 32, 64, 128], "key_block": [16, 32, 64], "stop_interval": [1, 1, 2, 3, 5],
    "num_classes": [16, 32, 32, 64, 128], "ranking": ["kv_head", "query_head"], "head_size": HEAD_SIZES,
    "group": GROUPS, "page": PAGES, "dtype": [0, 1, 2], "layout": [*LAYOUTS, "any", "any"],
}  # fmt: skip
"""What kernels are compiled for, but for budgets."""


def few_kinds() -> list[dict]:
    """Of VLLM_S2O_KERNELS=COUNT or COUNT@SEED, so many kinds of problems, drawn once for a process: on a GPU a problem
    of a new kind takes seconds to compile, and others milliseconds. None where it is not set."""
    count, _, seed = os.environ.get("VLLM_S2O_KERNELS", "0").partition("@")
    chance = random.Random(int(seed or 0))
    return [{name: chance.choice(values) for name, values in KINDS.items()} for _ in range(int(count))]


FEW = few_kinds()


@dataclass
class Problem:
    case: Case
    params: S2OParams
    out: torch.Tensor
    """To be written, in memory of some strides; holds NaN."""
    prompt_lens: list[int] | None = None

    @property
    def arguments(self) -> dict:
        return self.case.arguments | {"params": self.params, "prompt_lens": self.prompt_lens}

    @property
    def num_rankings(self) -> int:
        return self.params.num_rankings(self.case.query.shape[1], self.case.key_cache.shape[2])

    def __str__(self) -> str:
        """All but the numbers, from what the host knows: after a fault nothing can be read from the device."""
        case = self.case
        tensors = (
            f"{name} {list(tensor.shape)} by {tensor.stride()}"
            for name, tensor in (("query", case.query), ("key", case.key_cache), ("value", case.value_cache))
        )
        lengths = f"queries {case.query_lens} of {case.lens} tokens, prompts {self.prompt_lens}"
        return (
            f"{lengths}; {', '.join(tensors)}, table {list(case.block_table.shape)}, {case.query.dtype}; {self.params}"
        )


def strided(draw, shape: tuple[int, ...], dtype, dense_last: bool = False) -> torch.Tensor:
    """NaN in memory whose dimensions lie in any order, with gaps between their rows."""
    dims = list(range(len(shape)))
    inner = dims.pop() if dense_last else None
    order = draw(st.permutations(dims))
    if inner is not None:
        order.append(inner)
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim] + (0 if dim == inner else draw(st.sampled_from([0, 0, 3, 16])))
    return torch.full((max(step, 1) + 16,), torch.nan, dtype=dtype, device=DEVICE).as_strided(shape, strides)


def lengths(draw, segment_len: int, most: int) -> tuple[int, int]:
    """Queries and length of a sequence: a whole prompt, a chunk, the next token, at borders or beside them, or none."""
    near = [n * segment_len + d for n in (1, 2, 3) for d in (-1, 0, 1)]
    length = draw(st.one_of(st.integers(0, most), st.sampled_from([n for n in near if n <= most] or [1])))
    kind = draw(st.sampled_from(["whole", "chunk", "chunk", "one", "none"]))
    borders = [length - n for n in range(0, length, segment_len)]
    chunk = draw(st.one_of(st.integers(0, length), st.sampled_from(borders or [0])))
    return {"whole": length, "chunk": chunk, "one": min(1, length), "none": 0}[kind], length


def thresholds(draw, num_heads: int):
    value = st.one_of(
        st.sampled_from([0.0, 1e-6, 0.02, 0.3, 0.99]), st.floats(0.001, 0.5, allow_nan=False, allow_infinity=False)
    )
    return draw(st.one_of(value, st.tuples(*[value] * num_heads)))


@st.composite
def problems(draw, dtypes=(torch.float32,), most: int = 320, small: bool = False) -> Problem:
    """`small`: few programs, for Triton's interpreter."""
    least = {"tile_size": [16, 32], "group": GROUPS[:3], "head_size": HEAD_SIZES[:4]} if small else {}
    one_by_one = st.fixed_dictionaries({name: st.sampled_from(of) for name, of in (KINDS | least).items()})
    kind = draw(st.sampled_from(FEW) if FEW and not small else one_by_one)
    tile = kind["tile_size"]
    segment_len = tile * draw(st.integers(1, 3))
    num_kv_heads = draw(st.integers(1, 2 if small else 3))
    num_heads = num_kv_heads * kind["group"]
    given = ("tile_size", "key_block", "stop_interval", "num_classes", "ranking")
    params = {name: kind[name] for name in given} | dict(
        segment_len=segment_len,
        dense_tail=draw(st.sampled_from([0, 0, 0, 1, tile, 100])),
        reference_len=draw(st.sampled_from([None, None, 1, 50, 150])),
    )  # fmt: skip
    if draw(st.integers(0, 5)) == 0:
        params["budget"] = draw(st.floats(0.01, 1.0))
    else:
        params["threshold"] = thresholds(draw, num_heads)
    shapes = [lengths(draw, segment_len, most) for _ in range(draw(st.integers(0 if small else 1, 2 if small else 4)))]
    query_lens, lens = [q for q, _ in shapes], [n for _, n in shapes]
    dtype = dtypes[kind["dtype"] % len(dtypes)]
    case = fill(draw, query_lens, lens, num_heads, num_kv_heads, kind, dtype)
    out = strided(draw, tuple(case.query.shape), dtype, dense_last=True)
    beyond = st.sampled_from([0, 0, 1, tile, 200])  # of a chunk's sequence there is more to come
    prompt_lens = draw(st.one_of(st.none(), st.tuples(*[beyond] * len(lens))))
    if prompt_lens is not None:
        prompt_lens = [length + more for length, more in zip(lens, prompt_lens, strict=True)]
    return Problem(case, S2OParams(**params), out, prompt_lens)


def fill(draw, query_lens, lens, num_heads: int, num_kv_heads: int, kind: dict, dtype) -> Case:
    """Numbers, in pages of any order, between memory and table entries that hold nothing of use."""
    head_size, page, layout = kind["head_size"], kind["page"], kind["layout"]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pages = [-(-n // page) for n in lens]
    blocks = sum(pages) + draw(st.integers(0, 3)) + 1
    shape = (blocks, page, num_kv_heads, head_size)
    if layout == "any":
        key_cache, value_cache = strided(draw, shape, dtype), strided(draw, shape, dtype)
    else:
        key_cache, value_cache = LAYOUTS[layout](*shape, dtype)
        key_cache.fill_(torch.nan)
        value_cache.fill_(torch.nan)
    width = max(pages, default=0) + draw(st.integers(0, 3))
    garbage = draw(st.lists(st.sampled_from(GARBAGE), min_size=1, max_size=4))
    count = max(width * len(lens), 1)
    table = torch.tensor((garbage * count)[:count], dtype=torch.int32)[: width * len(lens)].view(len(lens), width)
    free = torch.randperm(blocks, generator=generator)
    # A few keys draw most of the mass, as in real maps, or none do; numbers of the size of a model's, or larger.
    heavy, size = draw(st.sampled_from([0.0, 3.0, 8.0])), draw(st.sampled_from([0.3, 1.0, 3.0]))
    direction = torch.nn.functional.normalize(normal(num_kv_heads, head_size), dim=-1)
    for seq, length in enumerate(lens):
        mine, free = free[: pages[seq]], free[pages[seq] :]
        table[seq, : len(mine)] = mine.int()
        keys, values = normal(length, num_kv_heads, head_size), normal(length, num_kv_heads, head_size)
        keys += heavy * (torch.rand(length, num_kv_heads, generator=generator) ** 8)[..., None] * direction
        positions = torch.arange(length)
        where = mine[positions // page], positions % page
        key_cache[where] = (size * keys).to(DEVICE, dtype)
        value_cache[where] = values.to(DEVICE, dtype)
    query = strided(draw, (sum(query_lens), num_heads, head_size), dtype)
    shared = heavy * direction.repeat_interleave(num_heads // num_kv_heads, 0)
    query.copy_(normal(*query.shape) + shared)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return Case(
        query, key_cache, value_cache, table.to(DEVICE), starts.to(DEVICE),
        torch.tensor(lens, dtype=torch.int32, device=DEVICE), head_size**-0.5, list(query_lens), list(lens),
    )  # fmt: skip
