"""A step's tokens and cache, as vLLM hands them to a layer."""

import tiny
import torch
from cases import Case

from vllm_s2o import compat
from vllm_s2o.compat import caches

CPU = torch.device("cpu")
DENSE = compat.dense_backend()
SHORT = {"segment_len": 64, "tile_size": 32, "key_block": 16, "min_seq_len": 128, "min_query_len": 32, "dense_tail": 0}
EXACT = {**SHORT, "threshold": 0.0}
ALL_DENSE = {**EXACT, "layers": [{"layers": 0, "threshold": "dense"}]}

# A decode, a short prefill, the last 200 tokens of a long prompt, another decode, and a whole long prompt.
QUERY_LENS, SEQ_LENS = [1, 20, 200, 1, 150], [300, 20, 500, 40, 150]
LONG = [2, 4]
STARTS = [0, 1, 21, 221, 222, 372]


class Batch:
    """A step's tokens, and a cache that holds all tokens of its sequences."""

    def __init__(self, layer, dtype="float32", seed=0, query_lens=QUERY_LENS, seq_lens=SEQ_LENS):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

        pages = [-(-length // tiny.PAGE) for length in seq_lens]
        free = iter(torch.randperm(sum(pages) + 2, generator=generator).tolist())
        self.table = torch.full((len(seq_lens), max(pages) + 1), 2**30, dtype=torch.int32)
        for row, count in enumerate(pages):
            self.table[row, :count] = torch.tensor([next(free) for _ in range(count)])
        slots = [
            self.table[row, at // tiny.PAGE].long() * tiny.PAGE + at % tiny.PAGE
            for row, at in enumerate(map(torch.arange, seq_lens))
        ]
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.query = normal(sum(query_lens), tiny.NUM_HEADS, tiny.HEAD_SIZE)
        self.written = normal(2, sum(seq_lens), tiny.NUM_KV_HEADS, tiny.HEAD_SIZE)
        ends = torch.tensor(seq_lens).cumsum(0).tolist()
        new = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, query_lens, strict=True)])
        self.key, self.value = self.written[0][new], self.written[1][new]
        self.slots = torch.cat(slots)[new]
        shape = (sum(pages) + 2, tiny.NUM_KV_HEADS, tiny.PAGE, 2 * tiny.HEAD_SIZE)
        self.cache = torch.zeros(shape, dtype=self.query.dtype)
        layer.impl.do_kv_cache_update(layer, *self.written, self.cache, torch.cat(slots))

    @property
    def common(self):
        return tiny.common_metadata(self.query_lens, self.seq_lens, self.table, self.slots)

    def attend(self, layer, metadata) -> torch.Tensor:
        """Rows that nobody writes stay NaN."""
        out = torch.full_like(self.query, torch.nan)
        layer.impl.forward(layer, self.query, self.key, self.value, self.cache, metadata, out)
        return out

    def case(self, layer, rows) -> Case:
        """Some rows as a problem of their own, for `prefill_attention`."""
        keys, values, table = caches.views(layer, layer.impl, self.cache, self.table)
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).tolist()
        query_lens, lens = [self.query_lens[row] for row in rows], [self.seq_lens[row] for row in rows]
        return Case(
            torch.cat([self.query[starts[row] : starts[row + 1]] for row in rows]), keys, values, table[rows],
            torch.tensor([0, *query_lens]).cumsum(0).int(), torch.tensor(lens, dtype=torch.int32), tiny.HEAD_SIZE**-0.5,
            query_lens, lens,
        )  # fmt: skip


def rows_of(out: torch.Tensor, rows) -> torch.Tensor:
    return torch.cat([out[STARTS[row] : STARTS[row + 1]] for row in rows])
