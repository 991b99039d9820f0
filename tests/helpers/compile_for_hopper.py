"""Compile kernels for a Hopper GPU, on any machine, look at what was compiled, and print the shared memory that each
takes: those in Gluon, and in Triton those that take most, those whose products run on while warps go on, and what a
compiler got wrong before.

A process of its own, because tests without a GPU have Triton's interpreter, which Gluon has not.
"""

import itertools
import math

import torch
import triton
from barriers import check_barriers
from machine_code import disassemble
from running_products import check_running_products
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from unwritten_registers import check_unwritten_registers

from vllm_s2o.kernels import hopper, naive, prefill, rank, vote
from vllm_s2o.kernels.common import block_dim

POINTERS = {
    "Query": "*bf16", "Keys": "*bf16", "Values": "*bf16", "Out": "*bf16", "Thresholds": "*fp32", "Classes": "*u8",
    "Mean": "*bf16", "Variance": "*bf16", "Spread": "*fp32",
}  # fmt: skip
"""The other capitalised arguments are tables of int32."""


def compile_for_hopper(
    kernel, constants: dict, dtype: str = "bf16", language=GluonASTSource, aligned: bool = True,
    cache: str | None = None, **options,
) -> int:  # fmt: skip
    """aligned: strides are multiples of 16; cache: the type of keys and values, where it is another one."""
    names = kernel.arg_names
    signature, attributes = {}, {}
    for at, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name[0].isupper():
            kept = cache if name in ("Keys", "Values") and cache else dtype
            signature[name] = POINTERS.get(name, "*i32").replace("bf16", kept)
            attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("scale") else "i32"
            if aligned and name.startswith("stride") and name != "stride_table":
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = language(
        fn=kernel, signature=signature, attrs=attributes,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    check_barriers(compiled.asm["ptx"])
    sass = disassemble(compiled.asm["cubin"])
    check_unwritten_registers(sass)
    products = check_running_products(sass)
    if "wgmma.mma_async" in compiled.asm["ptx"] and not products:
        raise SystemExit("no product was found: is machine code written otherwise now?")
    return compiled.metadata.shared


def main() -> None:
    launch = hopper.Launch()
    attend = dict(
        PAGE=16, GROUP=4, RANKED=1, D=128, HALVES=2, BLOCK=launch.block, UNIT=64, INTERVAL=4,
        STAGES=launch.num_stages, VISIT_REGISTERS=launch.visit_registers, GATHER_REGISTERS=launch.gather_registers,
    )  # fmt: skip
    print("attend", compile_for_hopper(hopper._attend, attend, num_warps=4, maxnreg=168))
    # Everything that the kernel does otherwise for other problems, at once.
    attend |= dict(D=64, HALVES=1, RANKED=4)
    print("attend_other", compile_for_hopper(hopper._attend, attend, "fp16", num_warps=4, maxnreg=248))
    for head_size, apart in ((32, False), (32, True), (256, False)):
        tiled = prefill.launch(torch.empty(1, 1, head_size, dtype=torch.bfloat16, device="meta"), 64, 256)
        # Of one KV head, with the numbers of a key as far apart as keys are elsewhere, and nothing at a multiple of 16.
        strides = dict(stride_k_token=1) if apart else dict(stride_k_dim=1)
        taken = compile_for_hopper(
            prefill._attend,
            dict(
                PAGE=16, GROUP=4, RANKED=4, D=head_size, BLOCK_D=block_dim(head_size), TILE=64, BLOCK=tiled.block,
                UNIT=64, INTERVAL=4, PRECISION="tf32", stride_v_dim=1, **strides,
            ),
            language=ASTSource, aligned=not apart, num_warps=tiled.num_warps, num_stages=tiled.num_stages,
        )  # fmt: skip
        print(f"attend_triton_{head_size}{'_apart' if apart else ''}", taken)
    sort = dict(BLOCK=32 * vote.ROUNDS, CLASSES=vote.CLASSES)
    print("count", compile_for_hopper(vote.count, dict(BLOCKS=4, **sort), num_warps=1))
    strides = {
        "": (2**16, 2**12, 2**8, 1),
        "_apart": (2**16, 2**12, 2**8, 16),
        "_anywhere": (7 * 2**16, 7 * 2**12, 7, 1),
    }
    for head_size, dtype, where in itertools.product((128, 256), (torch.bfloat16, torch.float32), strides):
        query = torch.empty(1, 1, head_size, dtype=dtype, device="meta")
        score = rank.score_options(query, rank.MAX_SCORED_TOGETHER, 227 * 1024, strides[where])
        options = {name: score.pop(name) for name in ("num_warps", "num_stages")}
        score |= dict(PAGE=16, D=head_size, BLOCK_D=block_dim(head_size), PART=rank.SCORE_PART, SHARING=4)
        score |= dict(CLASSES=32, LOGISTIC=naive.LOGISTIC / math.log(2))
        score |= {"stride_dim": 1} if strides[where][3] == 1 else {}
        options |= {"aligned": strides[where][2] % 16 == 0}
        name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        taken = compile_for_hopper(rank._score, score, name, language=ASTSource, **options)
        print(f"score_{head_size}_{name}{where}", taken)
    print("place", compile_for_hopper(vote.place, dict(PAGE=16, **sort), num_warps=1))


if __name__ == "__main__":
    main()
