"""Compile the Gluon kernels for a Hopper GPU, on any machine; prints the shared memory that each takes.

A process of its own, because tests without a GPU have Triton's interpreter, which Gluon has not.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from vllm_s2o.kernels import hopper, vote

POINTERS = {
    "Query": "*bf16", "Keys": "*bf16", "Values": "*bf16", "Out": "*bf16", "Thresholds": "*fp32", "Classes": "*u8",
}  # fmt: skip
"""The other capitalised arguments are tables of int32."""


def compile_for_hopper(kernel, constants: dict, dtype: str = "bf16", **options) -> int:
    names = kernel.arg_names
    signature, attributes = {}, {}
    for at, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = POINTERS.get(name, "*i32").replace("bf16", dtype)
            attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name.startswith("stride") and name != "stride_table":
                attributes[(at,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(
        fn=kernel, signature=signature, attrs=attributes,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def main() -> None:
    launch = hopper.Launch()
    attend = dict(
        PAGE=16, GROUP=4, D=128, HALVES=2, BLOCK=launch.block, UNIT=64, INTERVAL=4, WORST_ROW=True,
        STAGES=launch.num_stages, VISIT_REGISTERS=launch.visit_registers, GATHER_REGISTERS=launch.gather_registers,
    )  # fmt: skip
    print("attend", compile_for_hopper(hopper._attend, attend, num_warps=4, maxnreg=168))
    # Everything that the kernel does otherwise for other problems, at once.
    attend |= dict(D=64, HALVES=1, WORST_ROW=False)
    print("attend_other", compile_for_hopper(hopper._attend, attend, "fp16", num_warps=4, maxnreg=248))
    sort = dict(BLOCK=32 * vote.ROUNDS, CLASSES=vote.CLASSES)
    print("count", compile_for_hopper(vote.count, dict(BLOCKS=4, **sort), num_warps=1))
    print("place", compile_for_hopper(vote.place, dict(PAGE=16, **sort), num_warps=1))


if __name__ == "__main__":
    main()
