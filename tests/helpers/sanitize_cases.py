"""A few kernel cases for `compute-sanitizer`, which runs them some hundred times slower: see `benchmarks/sanitize.sh`.

Together they take both paths (Gluon and Triton alone), the layouts of caches, histories that end inside a block, tiles
that stop early, tiles that are computed again, and memory with gaps.
"""

import argparse
import dataclasses
from typing import Any

import torch
from cases import by_rows, make_case

from vllm_s2o import S2OParams, prefill_attention
from vllm_s2o.attention import Implementation

SMALL: dict[str, Any] = dict(query_lens=[150, 1, 70], seq_lens=[150, 90, 333])
"""A whole prompt, the next token, and a chunk that begins and ends inside segments."""

CASES: dict[str, dict[str, Any]] = {
    "dense": dict(params=dict(threshold=0.0)),
    "stops": dict(params=dict(threshold=0.4), layout="joined_blocks"),
    "dense end": dict(params=dict(threshold=0.6, dense_tail=30), query_lens=[300, 1], seq_lens=[450, 90]),
    "long histories": dict(params=dict(threshold=0.6, reference_len=100)),
    "one half": dict(params=dict(threshold=0.3, tile_size=64, segment_len=64, key_block=32, stop_interval=1)),
    "each KV head": dict(params=dict(threshold=0.4, ranking="kv_head")),
    "fp16": dict(params=dict(threshold=0.7), dtype=torch.float16, head_size=64),
    "bad numbers": dict(params=dict(threshold=0.0), bad=True),
    "heads apart": dict(params=dict(threshold=0.4), layout="head_major"),
    "head size 96, 16 classes": dict(params=dict(threshold=0.3, num_classes=16), head_size=96, layout="separate"),
    "fp8 caches": dict(params=dict(threshold=0.3), fp8=True),
    "head size 32, gaps": dict(
        params=dict(threshold=0.3, tile_size=64, segment_len=64),
        head_size=32,
        page=32,
        num_heads=4,
        num_kv_heads=2,
        layout="separate",
        gaps=True,
    ),
    "budget": dict(params=dict(budget=0.3), layout="transposed_keys", page=32),
}
DEFAULTS: dict[str, Any] = dict(num_heads=2, num_kv_heads=1, head_size=128, dtype=torch.bfloat16, layout="joined_rows")


def with_gaps(cache: torch.Tensor) -> torch.Tensor:
    """The same in memory where nothing is aligned and no row follows another one."""
    blocks, page, heads, size = cache.shape
    memory = torch.full((heads, blocks, page + 1, size + 3), float("nan"), dtype=cache.dtype, device=cache.device)
    found = memory.permute(1, 2, 0, 3)[:, :page, :, :size]
    return found.copy_(cache)


def run(name: str, implementation: Implementation) -> None:
    options = dict(CASES[name])
    params = S2OParams(**{"dense_tail": 0, "segment_len": 128, "stop_interval": 1} | options.pop("params"))
    bad = options.pop("bad", False)
    fp8 = options.pop("fp8", False)
    gaps = options.pop("gaps", False)
    case = make_case(**SMALL | DEFAULTS | options)
    if fp8:
        key_cache, value_cache = (cache.to(torch.float8_e4m3fn) for cache in (case.key_cache, case.value_cache))
        case = dataclasses.replace(case, key_cache=key_cache, value_cache=value_cache)
    if gaps:
        case = dataclasses.replace(case, key_cache=with_gaps(case.key_cache), value_cache=with_gaps(case.value_cache))
    if bad:
        block, place = int(case.block_table[0, 3]), 5
        case.value_cache[block, place, 0, 7] = float("nan")
    out, stats = prefill_attention(**case.arguments, params=params, return_stats=True, implementation=implementation)
    torch.cuda.synchronize()
    density = (stats.visited_pairs.sum() / stats.causal_pairs.sum()).item()
    if not bad and not out.isfinite().all():
        raise SystemExit(f"{name}: not finite")
    if density == 1:
        exact = by_rows(case)
        known = exact.isfinite()
        error = (out.double() - exact)[known].abs().max().item()
        if not error < 0.1:
            raise SystemExit(f"{name}: off by {error}")
    print(f"{implementation:7} {name}: density {density:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernel cases for compute-sanitizer.")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    args = parser.parse_args()
    for name in args.cases:
        run(name, "cuda")
        run(name, "triton")


if __name__ == "__main__":
    main()
