"""Gluon, for NVIDIA GPUs: two steps of `rank.py`'s counting sort, by votes among the threads of a warp.

A warp takes keys 32 at a time, one a thread. Thread c also stands for class c: five votes, one for each bit of a class,
tell it which of the 32 keys are of its class, and so how many. That is the count. To place them, a key asks the thread
of its class for that set and for the running count: some 40 instructions for 32 keys, where running counts of all
classes take 200.

Neighbouring keys go to places far apart, each a sector of memory of its own, and that is what placing would wait for.
So a block's keys are sorted in shared memory before they are written, and leave as one run for each class.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CLASSES = 32
"""As many as a warp has threads."""

ROUNDS = 16
"""Times 32 keys, which makes the block of `rank.SORT_BLOCK`."""

_THREAD = [
    ".reg .u32 lane, bit, v, set, n0, n1, n2, n3, n4;",
    ".reg .pred p;",
    "mov.u32 lane, %laneid;",
    *(line for b in range(5) for line in (f"bfe.u32 bit, lane, {b}, 1;", f"sub.u32 n{b}, bit, 1;")),
]
"""n0 to n4: all ones where that bit of this thread's class is 0."""


def _set_of_class(key: str, shift: int = 0) -> list[str]:
    """PTX: which of 32 keys are of this thread's class; a key's class stands in its operand from bit `shift` on."""
    lines = []
    for b in range(5):
        lines += [
            f"and.b32 bit, {key}, {1 << (shift + b)};",
            "setp.ne.u32 p, bit, 0;",
            "vote.sync.ballot.b32 v, p, 0xffffffff;",
            # set & (v ^ n)
            f"xor.b32 set, v, n{b};" if b == 0 else f"lop3.b32 set, set, v, n{b}, 0x60;",
        ]
    return lines


def _count_instructions() -> str:
    """PTX for a thread: 16 classes in the bytes of operands 4 to 7, the address of the block's counts in 8, and in 12
    how many of the block's keys are beyond the end, whose classes read as 0. Operands 0 to 3 bring nothing."""
    lines = [
        "{",
        *_THREAD,
        ".reg .u32 total, here;",
        ".reg .u64 at;",
        "mov.u32 total, 0;",
    ]
    for word in range(4):
        for byte in range(4):
            lines += [
                *_set_of_class(f"${4 + word}", 8 * byte),
                "popc.b32 here, set;",
                "add.u32 total, total, here;",
            ]
    lines += [
        "setp.eq.u32 p, lane, 0;",
        "@p sub.u32 total, total, $12;",
        "mad.wide.u32 at, lane, 4, $8;",
        "st.global.b32 [at], total;",
        *(f"mov.u32 ${word}, 0;" for word in range(4)),
    ]
    return "\n".join([*lines, "}"])


def _place_instructions() -> str:
    """PTX for a thread: classes in operands 32 to 47, slots in 48 to 63, the address of the block's offsets in 64;
    slots in the order of their places in 0 to 15, and these places in 16 to 31."""
    lines = [
        "{",
        *_THREAD,
        f".shared .align 8 .b64 sorted[{32 * ROUNDS}];",
        ".reg .u32 earlier, running, same, mine, first, further, to, mem;",
        ".reg .u64 at;",
        "mov.u32 earlier, %lanemask_lt;",
        "mov.u32 running, 0;",
    ]
    for r in range(ROUNDS):
        cls, rank = f"${2 * ROUNDS + r}", f"${ROUNDS + r}"
        lines += [
            *_set_of_class(cls),
            f"shfl.sync.idx.b32 same, set, {cls}, 31, 0xffffffff;",
            f"shfl.sync.idx.b32 mine, running, {cls}, 31, 0xffffffff;",
            "and.b32 same, same, earlier;",
            "popc.b32 same, same;",
            f"add.u32 {rank}, mine, same;",
            "popc.b32 same, set;",
            "add.u32 running, running, same;",
        ]
    # Where each class begins in the block, and how far from there to its place in the ranking.
    lines += ["mov.u32 first, running;"]
    for step in (1, 2, 4, 8, 16):
        lines += [f"shfl.sync.up.b32 to|p, first, {step}, 0, 0xffffffff;", "@p add.u32 first, first, to;"]
    lines += [
        "sub.u32 first, first, running;",
        f"mad.wide.u32 at, lane, 4, ${4 * ROUNDS};",
        "ld.global.b32 further, [at];",
        "sub.u32 further, further, first;",
    ]
    for r in range(ROUNDS):
        cls, slot, rank = f"${2 * ROUNDS + r}", f"${3 * ROUNDS + r}", f"${ROUNDS + r}"
        lines += [
            f"shfl.sync.idx.b32 mine, first, {cls}, 31, 0xffffffff;",
            f"shfl.sync.idx.b32 to, further, {cls}, 31, 0xffffffff;",
            f"add.u32 mine, mine, {rank};",
            "add.u32 to, to, mine;",
            "mov.u32 mem, sorted;",
            "mad.lo.u32 mem, mine, 8, mem;",
            f"st.shared.v2.b32 [mem], {{{slot}, to}};",
        ]
    lines += ["bar.warp.sync 0xffffffff;", "mov.u32 mem, sorted;", "mad.lo.u32 mem, lane, 8, mem;"]
    lines += [f"ld.shared.v2.b32 {{${r}, ${ROUNDS + r}}}, [mem+{256 * r}];" for r in range(ROUNDS)]
    return "\n".join([*lines, "}"])


_COUNT = gl.constexpr(_count_instructions())
_COUNT_OPERANDS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 4 + ["l"] * 4 + ["r"] * 4))
_PLACE = gl.constexpr(_place_instructions())
_PLACE_OPERANDS = gl.constexpr(",".join(["=&r"] * 2 * ROUNDS + ["r"] * 2 * ROUNDS + ["l"] * ROUNDS))
_ROUNDS = gl.constexpr(ROUNDS)


@gluon.jit(do_not_specialize=["num_blocks"])
def count(
    Segments, Classes, Counts, num_rankings, num_blocks,
    BLOCK: gl.constexpr, BLOCKS: gl.constexpr, CLASSES: gl.constexpr,
):  # fmt: skip
    """`rank._count` for 32 classes; launched with one warp."""
    ranking, segment = gl.program_id(1), gl.program_id(2)
    history = gl.load(Segments + segment * 7 + 4)
    # Segments are whole tiles, 16 rows at least, so that classes can be read 16 at a time.
    begin = gl.multiple_of(gl.load(Segments + segment * 7 + 6) + ranking * history, 16)
    words = gl.multiple_of((Classes + begin).to(gl.pointer_type(gl.int32), bitcast=True), 16)
    end = gl.multiple_of(history // 4, 4)
    for i in gl.static_range(BLOCKS):
        block = gl.program_id(0) * BLOCKS + i
        if block * BLOCK < history:
            word = block * (BLOCK // 4) + gl.arange(0, BLOCK // 4, gl.BlockedLayout([4], [32], [1], [0]))
            cls = gl.load(words + word, mask=word < end, other=0)
            beyond = gl.maximum((block + 1) * BLOCK - history, 0)
            counts = Counts + ((segment * num_rankings + ranking) * num_blocks + block).to(gl.int64) * CLASSES
            at = gl.full([BLOCK // 4], 0, gl.int64, word.type.layout) + counts.to(gl.int64, bitcast=True)
            gl.inline_asm_elementwise(
                _COUNT, _COUNT_OPERANDS, [cls, at, gl.full([BLOCK // 4], 0, gl.int32, word.type.layout) + beyond],
                dtype=gl.int32, is_pure=False, pack=4,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["num_blocks", "stride_table"])
def place(
    Segments, Classes, Offsets, BlockTable, Slots, num_rankings, num_blocks, stride_table,
    PAGE: gl.constexpr, BLOCK: gl.constexpr, CLASSES: gl.constexpr,
):  # fmt: skip
    """`rank._place` for 32 classes; launched with one warp."""
    block, ranking, segment = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    history = gl.load(Segments + segment * 7 + 4)
    if block * BLOCK < history:
        table = BlockTable + gl.load(Segments + segment * 7).to(gl.int64) * stride_table
        begin = gl.load(Segments + segment * 7 + 6) + ranking * history
        # One key a thread and round, in the order of positions.
        key = block * BLOCK + gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [1], [0]))
        known = key < history
        cls = gl.load(Classes + begin + key, mask=known, other=0).to(gl.int32)
        page = gl.load(table + key // PAGE, mask=known, other=0)
        # What lies beyond the end comes last in its class, wherever that is, and is not written.
        slot = gl.where(known, page * PAGE + key % PAGE, -1)
        offsets = Offsets + ((segment * num_rankings + ranking) * num_blocks + block).to(gl.int64) * CLASSES
        at = gl.full([BLOCK], 0, gl.int64, key.type.layout) + offsets.to(gl.int64, bitcast=True)
        slot, place = gl.inline_asm_elementwise(
            _PLACE, _PLACE_OPERANDS, [cls, slot, at], dtype=(gl.int32, gl.int32), is_pure=False, pack=_ROUNDS
        )
        gl.store(Slots + begin + place, slot, mask=slot >= 0)
