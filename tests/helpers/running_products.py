"""Whether a kernel, as compiled, leaves alone what its products still need.

On Hopper a product (wgmma, in machine code HGMMA) runs on while its warps go on. Until they wait for it, it reads its
left operand from registers, if it has it there, and adds to an accumulator in others. Only ptxas keeps other
instructions from these registers, and before 13.3 it did not always (triton-lang/triton, issue 9433 and pull request
11781): now and then a result is wrong. S2O's softmax runs beside such products, so its code is looked at.
"""

import re
from dataclasses import dataclass

from machine_code import Code, Meeting

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\S* (R\d+), (?:(R\d+), )?gdesc\[\S+, (?:\2|RZ)(?=,|$)")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
UNKNOWN = re.compile(r"\w*GMMA|WARPGROUP\.DEPBAR|BRX|JMP|JMX|CALL|RET")
"""What would have to be understood before anything is said of a kernel with it; those of these that are, come first."""
REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
LEFT = 4
"""Registers of a left operand: 64 rows of 16 columns of 16 bits, over 128 threads."""


@dataclass(frozen=True)
class Group:
    """Products that are waited for together."""

    accumulators: frozenset[range] = frozenset()
    lefts: frozenset[range] = frozenset()
    complete: bool = False


def _named(text: str) -> set[int]:
    """The registers of an instruction, read or written. Rather more than fewer: one that takes 64 or 128 bits anywhere
    is believed to take them wherever it names a register, but for addresses and the factors of a wide product."""
    operation = text.split()[0]
    width = 4 if re.search(r"\.128|MT?88\.4", operation) else 2 if re.search(r"\.64|WIDE|MT?88\.2", operation) else 1
    narrow = " ".join(re.findall(r"\[.*?\]", text))
    operands = re.sub(r"\[.*?\]", "", text)
    if "WIDE" in operation and len(parts := operands.split(",")) == 4:
        narrow += " ".join(parts[1:3])
        operands = ",".join([parts[0], parts[3]])
    return {
        int(first) + more
        for part, least in ((operands, width), (narrow, 1))
        for first, pair in REGISTER.findall(part)
        for more in range(max(least, 2 if pair else 1))
    }


def _common(some: range, others: frozenset[range]) -> bool:
    return any(set(some) & set(other) for other in others)


def _after(text: str, predicate: str | None, running: tuple[Group, ...]) -> tuple[tuple[Group, ...], bool]:
    """The groups that run after an instruction, and whether it touched what one of them needs."""
    waited, product = WAIT.match(text), PRODUCT.match(text)
    if waited and predicate is None and all(group.complete for group in running):
        return running[max(0, len(running) - int(waited[1], 16)) :], False
    if not product or predicate is not None:
        if UNKNOWN.match(text):
            raise SystemExit(f"{predicate or ''} {text}: such an instruction is not followed".strip())
        named = _named(text)
        return running, any(named & set(needed) for group in running for needed in group.accumulators | group.lefts)
    size, into, left = product.groups()
    accumulator = range(int(into[1:]), int(into[1:]) + int(size) // 2)
    lefts = frozenset([range(int(left[1:]), int(left[1:]) + LEFT)]) if left else frozenset()
    touched = any(
        _common(accumulator, group.lefts)
        or any(_common(operand, group.accumulators) for operand in lefts)
        # Products that add to one accumulator keep their order.
        or _common(accumulator, group.accumulators - {accumulator})
        for group in running
    )
    before = running[-1] if running and not running[-1].complete else None
    group = Group((before or Group()).accumulators | {accumulator}, (before or Group()).lefts | lefts, "gsb0" in text)
    return (*(running[:-1] if before else running), group), touched


def check_running_products(sass: str) -> int:
    """Follow every path through a kernel.

    Returns: how many instructions are products.
    Raises:
        SystemExit: one of them needs a register that another instruction touches before it is waited for.
    """
    code = Code.read(sass)
    paths: list[tuple[int, tuple[Group, ...], Meeting]] = [(0, (), ())] if code.instructions else []
    seen = set()
    while paths:
        at, running, meeting = path = paths.pop()
        if path in seen:
            continue
        seen.add(path)
        here = code.instructions[at]
        running, touched = _after(here.text, here.predicate, running)
        if touched:
            raise SystemExit(f"at {here.address}, {here.text} touches what a running product needs")
        paths += [(goal, running, met) for goal, met in code.after(at, meeting)]
    return sum(bool(PRODUCT.match(one.text)) for one in code.instructions)
