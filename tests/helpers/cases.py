"""Random attention problems on paged caches of every layout that vLLM uses."""

from dataclasses import dataclass

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _separate(blocks, page, heads, size, dtype):
    """Two tensors of their own."""
    return [torch.zeros(blocks, page, heads, size, dtype=dtype, device=DEVICE) for _ in range(2)]


def _joined_blocks(blocks, page, heads, size, dtype):
    """vLLM 0.25.1 on CUDA: [blocks, 2, page, heads, size]."""
    return torch.zeros(blocks, 2, page, heads, size, dtype=dtype, device=DEVICE).unbind(1)


def _joined_rows(blocks, page, heads, size, dtype):
    """vLLM 0.32 on CUDA: [blocks, heads, page, 2 * size] over memory ordered blocks, page, heads."""
    memory = torch.zeros(blocks, page, heads, 2 * size, dtype=dtype, device=DEVICE)
    return memory.split(size, dim=-1)


def _head_major(blocks, page, heads, size, dtype):
    """HND: a head's page is contiguous."""
    memory = torch.zeros(blocks, 2, heads, page, size, dtype=dtype, device=DEVICE)
    return memory.transpose(2, 3).unbind(1)


def _transposed_keys(blocks, page, heads, size, dtype):
    """vLLM on CPU, `vec`: a page of K is stored [size, page]."""
    memory = torch.zeros(blocks, heads, 2, page * size, dtype=dtype, device=DEVICE)
    keys = memory[:, :, 0].unflatten(-1, (size, page)).permute(0, 3, 1, 2)
    values = memory[:, :, 1].unflatten(-1, (page, size)).transpose(1, 2)
    return keys, values


LAYOUTS = {
    "separate": _separate,
    "joined_blocks": _joined_blocks,
    "joined_rows": _joined_rows,
    "head_major": _head_major,
    "transposed_keys": _transposed_keys,
}


@dataclass
class Case:
    """Arguments of `prefill_attention`, and the lengths as Python lists."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    query_lens: list[int]
    lens: list[int]

    @property
    def arguments(self) -> dict:
        names = ("query", "key_cache", "value_cache", "block_table", "query_start_loc", "seq_lens", "scale")
        return {name: getattr(self, name) for name in names}


def make_case(
    query_lens,
    seq_lens,
    *,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    page=16,
    dtype=torch.float32,
    layout="separate",
    seed=0,
    stripes=True,
) -> Case:
    """Sequences in shuffled pages. With `stripes`, a few keys draw most of the mass, as in real maps:
    a shared direction in all queries that some keys point along."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pages = [-(-n // page) for n in seq_lens]
    blocks = sum(pages) + 3
    free = torch.randperm(blocks, generator=generator).tolist()
    table = torch.full((len(seq_lens), max(pages, default=1) + 2), 2**30, dtype=torch.int32)  # garbage beyond the end
    key_cache, value_cache = LAYOUTS[layout](blocks, page, num_kv_heads, head_size, dtype)
    direction = torch.nn.functional.normalize(normal(num_kv_heads, head_size), dim=-1)
    for seq, length in enumerate(seq_lens):
        mine = torch.tensor([free.pop() for _ in range(pages[seq])], dtype=torch.int64)
        table[seq, : len(mine)] = mine
        keys, values = normal(length, num_kv_heads, head_size), normal(length, num_kv_heads, head_size)
        if stripes:
            heavy = torch.rand(length, num_kv_heads, generator=generator) ** 8
            keys += 6 * heavy[..., None] * direction
        where = mine[torch.arange(length) // page], torch.arange(length) % page
        key_cache[where] = keys.to(DEVICE, dtype)
        value_cache[where] = values.to(DEVICE, dtype)
    query = normal(sum(query_lens), num_heads, head_size)
    if stripes:
        query += 5 * direction.repeat_interleave(num_heads // num_kv_heads, 0)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return Case(
        query.to(DEVICE, dtype), key_cache, value_cache, table.to(DEVICE), starts.to(DEVICE),
        torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE), head_size**-0.5, list(query_lens), list(seq_lens),
    )  # fmt: skip


def error_bar(case: Case) -> tuple[torch.Tensor, float]:
    """Dense attention in fp64, and twice what PyTorch's attention in the case's dtype errs against it:
    the largest absolute difference."""
    exact = torch.zeros(case.query.shape, dtype=torch.float64, device=DEVICE)
    starts, page = case.query_start_loc.tolist(), case.key_cache.shape[1]
    group = case.query.shape[1] // case.key_cache.shape[2]
    worst = 0.0
    for seq, length in enumerate(case.lens):
        if not case.query_lens[seq]:
            continue
        rows = slice(starts[seq], starts[seq + 1])
        positions = torch.arange(length, device=DEVICE)
        blocks = case.block_table[seq, positions // page].long()
        k, v = (c[blocks, positions % page].repeat_interleave(group, 1) for c in (case.key_cache, case.value_cache))
        mask = positions[None, :] <= positions[length - case.query_lens[seq] :, None]

        def attention(*tensors, mask=mask):
            heads_first = [t.transpose(0, 1)[None] for t in tensors]
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=case.scale)
            return out[0].transpose(0, 1).double()

        exact[rows] = attention(case.query[rows].double(), k.double(), v.double())
        worst = max(worst, (attention(case.query[rows], k, v) - exact[rows]).abs().max().item())
    return exact, 2 * worst


def by_rows(case: Case) -> torch.Tensor:
    """Dense attention in fp64, row by row over the keys that the row sees and no others: what dense attention means
    where numbers are NaN or infinite. A masked product is not that: 0 times NaN is NaN."""
    out = torch.empty(case.query.shape, dtype=torch.float64)
    starts, page = case.query_start_loc.tolist(), case.key_cache.shape[1]
    group = case.query.shape[1] // case.key_cache.shape[2]
    for seq, length in enumerate(case.lens):
        positions = torch.arange(length)
        blocks = case.block_table[seq].cpu()[positions // page].long()
        k, v = (
            c[blocks.to(DEVICE), (positions % page).to(DEVICE)].double().cpu()
            for c in (case.key_cache, case.value_cache)
        )
        for row in range(starts[seq], starts[seq + 1]):
            seen = length - (starts[seq + 1] - row) + 1
            q = case.query[row].double().cpu().unflatten(0, (-1, group))
            logits = torch.einsum("hgd,khd->hgk", q, k[:seen]) * case.scale
            weights = logits.softmax(-1)
            out[row] = torch.einsum("hgk,khd->hgd", weights, v[:seen]).flatten(0, 1)
    return out.to(DEVICE)


def place_of(case: Case, seq: int, position: int) -> tuple[int, int]:
    """Block, and place in the block, of a token."""
    page = case.key_cache.shape[1]
    return int(case.block_table[seq, position // page]), position % page
