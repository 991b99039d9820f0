"""Compile the Triton attention for a Hopper GPU as many kinds of models would have it, on any machine, look at the
machine code of each, and print a line for each: what was compiled, and "right" or what is wrong with it. Fails if
anything is.

The installed Triton compiles, or another one that stands on PYTHONPATH:

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR python tests/helpers/compile_many.py [HEAD_SIZE ...]
"""

import itertools
import math
import sys

import torch
import triton
from compile_for_hopper import compile_for_hopper
from triton.compiler import ASTSource

from vllm_s2o import S2OParams
from vllm_s2o.kernels import prefill
from vllm_s2o.kernels.common import block_dim

PARAMS = S2OParams()
BETWEEN = PARAMS.key_block * PARAMS.stop_interval
"""Keys between two tests."""

DENSE = dict(stride_k_dim=1, stride_v_dim=1)
LAYOUTS = {
    "keys dense": (DENSE, True),  # in all that vLLM lays out on a GPU
    "keys apart": (dict(stride_k_token=1, stride_v_dim=1), True),
    "keys apart, odd": (dict(stride_k_token=1, stride_v_dim=1), False),
    "keys and values apart": (dict(stride_k_token=1, stride_v_token=1), False),
}
"""Strides that are known, and whether the others are multiples of 16."""


HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)


def kinds(sizes: tuple[int, ...]):
    """(head size, rows of a tile, layout, type of the caches if it is another one)"""
    yield from ((*kind, None) for kind in itertools.product(sizes, (32, 64, 128), LAYOUTS))
    yield from ((size, 128, "keys dense", "fp8e4nv") for size in sizes if size in (64, 96, 128, 256))


def main(sizes: tuple[int, ...]) -> int:
    print(f"Triton {triton.__version__}")
    wrong = 0
    for head_size, tile, layout, cache in kinds(sizes or HEAD_SIZES):
        strides, aligned = LAYOUTS[layout]
        built = prefill.launch(torch.empty(1, 1, head_size, dtype=torch.bfloat16, device="meta"), tile, BETWEEN)
        shared = dict(
            PAGE=16, GROUP=4, RANKED=1, D=head_size, BLOCK_D=block_dim(head_size), TILE=tile, UNIT=PARAMS.key_block,
            INTERVAL=PARAMS.stop_interval,
            PRECISION="tf32", **strides,
        )  # fmt: skip
        kernels = {
            "attention": (prefill._attend, shared | {"BLOCK": built.block}, built.num_warps, built.num_stages),
            "marked tiles": (prefill._attend_marked, shared | {"BLOCK": math.gcd(BETWEEN, 32), "PARTS": 1}, 8, 1),
        }
        for name, (kernel, constants, warps, stages) in kernels.items():
            what = f"{name}: head size {head_size}, tiles of {tile}, {layout}{f', caches in {cache}' if cache else ''}"
            try:
                compile_for_hopper(
                    kernel, constants, language=ASTSource, aligned=aligned, cache=cache, num_warps=warps,
                    num_stages=stages,
                )  # fmt: skip
            except SystemExit as found:
                wrong += 1
                print(f"{what}: {found}", flush=True)
            else:
                print(f"{what}: right", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(tuple(map(int, sys.argv[1:]))))
