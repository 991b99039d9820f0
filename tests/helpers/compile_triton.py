"""Compile the Triton kernels for a Hopper GPU, on any machine; prints the shared memory that each takes.

Triton's interpreter, in which tests run them without a GPU, takes programs that no compiler does.
"""

import math

import torch
from compile_for_hopper import compile_for_hopper
from triton.compiler import ASTSource

from vllm_s2o.kernels import naive, prefill, rank
from vllm_s2o.kernels.tables import SORT_BLOCK, SPREAD_KEYS


def compile_for(kernel, constants: dict, **options) -> int:
    dense = {name: 1 for name in kernel.arg_names if name.endswith("_dim")}  # which the launcher specialises on
    given = {name: value for name, value in (constants | dense).items() if name in kernel.arg_names}
    return compile_for_hopper(kernel, given, language=ASTSource, **options)


def main() -> None:
    shape = dict(PAGE=16, D=128, BLOCK_D=128)
    attend = shape | dict(GROUP=4, RANKED=1, TILE=128, UNIT=64, INTERVAL=2, PRECISION="tf32")
    print("attend", compile_for(prefill._attend, attend | {"BLOCK": 64}, num_warps=8, num_stages=3))
    marked = attend | {"BLOCK": math.gcd(128, 32)}
    print("marked", compile_for(prefill._attend_marked, marked | {"PARTS": 1}, num_warps=8, num_stages=1))
    print("marked_halves", compile_for(prefill._attend_marked, marked | {"PARTS": 2}, num_warps=8, num_stages=1))

    # What takes most: numbers of four bytes, and heads that are padded to 256.
    options = prefill.launch(torch.empty(1, 1, 256, device="meta"), 128, 128)
    wide = dict(D=256, BLOCK_D=256, PRECISION="ieee", BLOCK=options.block)
    built = dict(num_warps=options.num_warps, num_stages=options.num_stages)
    print("attend_wide", compile_for(prefill._attend, attend | wide, dtype="fp32", **built))

    print("pool", compile_for(rank._pool, shape | {"GROUP": 1, "ROWS": 32}))
    scores = shape | dict(SHARING=4, COLUMNS=64, KEYS=rank.SCORE_KEYS, PRECISION="tf32")
    print("spread", compile_for(rank._spread, scores | {"PART": SPREAD_KEYS}, num_warps=8, num_stages=3))
    score = scores | dict(PART=rank.SCORE_PART, CLASSES=32, LOGISTIC=naive.LOGISTIC / math.log(2))
    print("score", compile_for(rank._score, score, num_warps=8, num_stages=3))
    sort = dict(BLOCK=SORT_BLOCK, CLASSES=64)
    print("count", compile_for(rank._count, sort | {"BLOCKS": rank.COUNTED_BLOCKS}, num_warps=1))
    print("offsets", compile_for(rank._offsets, sort | {"ROWS": 32}))
    print("place", compile_for(rank._place, sort | {"PAGE": 16}, num_warps=1))


if __name__ == "__main__":
    main()
