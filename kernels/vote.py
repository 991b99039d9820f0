"""Gluon, for NVIDIA GPUs: the placement of `rank.py`, by votes among the threads of a warp.

A warp takes keys 32 at a time, one a thread. Thread c also stands for class c: five votes, one for each bit of a class,
tell it which of the 32 keys are of its class, and so how many. A key asks the thread of its class for that set, and for
the running place: some 30 instructions for 32 keys, where running counts of all classes take 200.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CLASSES = 32
"""As many as a warp has threads."""

ROUNDS = 16
"""Times 32 keys, which makes the block of `rank.SORT_BLOCK`."""


def _instructions() -> str:
    """PTX for a thread: classes in operands 16 to 31, the address of the block's offsets in 32, places in 0 to 15."""
    lines = [
        "{",
        ".reg .u32 lane, earlier, place, bit, set, same, mine, count, n0, n1, n2, n3, n4, v0, v1, v2, v3, v4;",
        ".reg .u64 at;",
        ".reg .pred p;",
        "mov.u32 lane, %laneid;",
        "mov.u32 earlier, %lanemask_lt;",
        "mad.wide.u32 at, lane, 4, $32;",
        "ld.global.b32 place, [at];",
    ]
    for b in range(5):  # all ones where bit b of this thread's class is 0
        lines += [f"bfe.u32 bit, lane, {b}, 1;", f"sub.u32 n{b}, bit, 1;"]
    for r in range(ROUNDS):
        cls = f"${ROUNDS + r}"
        for b in range(5):
            lines += [
                f"and.b32 bit, {cls}, {1 << b};",
                "setp.ne.u32 p, bit, 0;",
                f"vote.sync.ballot.b32 v{b}, p, 0xffffffff;",
                f"xor.b32 v{b}, v{b}, n{b};",
            ]
        lines += [
            "and.b32 set, v0, v1;",
            "and.b32 set, set, v2;",
            "and.b32 set, set, v3;",
            "and.b32 set, set, v4;",
            f"shfl.sync.idx.b32 same, set, {cls}, 31, 0xffffffff;",
            f"shfl.sync.idx.b32 mine, place, {cls}, 31, 0xffffffff;",
            "and.b32 same, same, earlier;",
            "popc.b32 count, same;",
            f"add.u32 ${r}, mine, count;",
            "popc.b32 count, set;",
            "add.u32 place, place, count;",
        ]
    return "\n".join([*lines, "}"])


_PLACES = gl.constexpr(_instructions())
_OPERANDS = gl.constexpr(",".join(["=&r"] * ROUNDS + ["r"] * ROUNDS + ["l"] * ROUNDS))
_ROUNDS = gl.constexpr(ROUNDS)


@gluon.jit(do_not_specialize=["num_blocks", "stride_table"])
def place(
    Segments, Classes, Offsets, BlockTable, Slots, num_kv_heads, num_blocks, stride_table,
    PAGE: gl.constexpr, BLOCK: gl.constexpr, CLASSES: gl.constexpr,
):  # fmt: skip
    """`rank._place` for 32 classes; launched with one warp."""
    block, kv_head, segment = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    history = gl.load(Segments + segment * 7 + 4)
    if block * BLOCK < history:
        table = BlockTable + gl.load(Segments + segment * 7).to(gl.int64) * stride_table
        begin = gl.load(Segments + segment * 7 + 6) + kv_head * history
        # One key a thread and round, in the order of positions.
        key = block * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [1], [0]))
        known = key < history
        # What lies beyond the end comes last in its class, wherever that is, and is not written.
        cls = gl.load(Classes + begin + key, mask=known, other=0).to(gl.int32)
        page = gl.load(table + key // PAGE, mask=known, other=0)
        offsets = Offsets + ((segment * num_kv_heads + kv_head) * num_blocks + block).to(gl.int64) * CLASSES
        at = gl.full([BLOCK], 0, gl.int64, key.type.layout) + offsets.to(gl.int64, bitcast=True)
        places = gl.inline_asm_elementwise(
            _PLACES, _OPERANDS, [cls, at], dtype=gl.int32, is_pure=False, pack=_ROUNDS
        )
        gl.store(Slots + begin + places, page * PAGE + key % PAGE, mask=known)
