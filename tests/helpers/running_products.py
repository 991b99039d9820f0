"""Whether a kernel, as compiled, leaves alone what its products still need.

On Hopper a product (wgmma, in machine code HGMMA) runs on while its warps go on. Until they wait for it, it reads its
left operand from registers, if it has it there, and adds to an accumulator in others. Only ptxas keeps other
instructions from these registers, and before 13.3 it did not always (triton-lang/triton, issue 9433 and pull request
11781): now and then a result is wrong. S2O's softmax runs beside such products, so its code is looked at.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*(\S+)\s*(.*?)\s*;")
PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\S*\s+(\S+?),\s+(\S+?),")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
LEFT = 4
"""Registers of a left operand: 64 rows of 16 columns of 16 bits, over 128 threads."""


@dataclass(frozen=True)
class Group:
    """Products that are waited for together."""

    accumulators: frozenset[range] = frozenset()
    lefts: frozenset[range] = frozenset()
    complete: bool = False


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _named(text: str) -> set[int]:
    """The registers of an instruction, read or written. Rather more than fewer: one that takes 64 or 128 bits anywhere
    is believed to take them wherever it names a register, but for addresses."""
    operation = text.split()[0]
    width = 4 if re.search(r"\.128|M88\.4", operation) else 2 if re.search(r"\.64|WIDE|M88\.2", operation) else 1
    addresses = re.findall(r"\[.*?\]", text)
    operands = re.sub(r"\[.*?\]", "", text)
    return {
        int(first) + more
        for part, least in ((operands, width), (" ".join(addresses), 1))
        for first, pair in REGISTER.findall(part)
        for more in range(max(least, 2 if pair else 1))
    }


def _common(some: range, others: frozenset[range]) -> bool:
    return any(set(some) & set(other) for other in others)


def _after(text: str, running: tuple[Group, ...]) -> tuple[tuple[Group, ...], bool]:
    """The groups that run after an instruction, and whether it touched what one of them needs."""
    if waited := WAIT.match(text):
        return running[max(0, len(running) - int(waited[1], 16)) :], False
    if not (product := PRODUCT.match(text)):
        named = _named(text)
        return running, any(named & set(needed) for group in running for needed in group.accumulators | group.lefts)
    size, into, left = product.groups()
    first = int(REGISTER.match(into)[1])
    accumulator = range(first, first + int(size) // 2)
    found = REGISTER.match(left)
    lefts = frozenset([range(int(found[1]), int(found[1]) + LEFT)]) if found else frozenset()
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
    code: list[tuple[str, str | None, str]] = []
    labels = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append((found[1], found[2], f"{found[3]} {found[4]}"))
    paths: list[tuple[int, tuple[Group, ...]]] = [(0, ())]
    seen = set()
    while paths:
        at, running = paths.pop()
        while at < len(code) and (at, running) not in seen:
            seen.add((at, running))
            address, predicate, text = code[at]
            running, touched = _after(text, running)
            if touched:
                raise SystemExit(f"at {address}, {text} touches what a running product needs")
            if text.startswith("BRA"):
                paths.append((labels[re.search(r"\.L_x_\d+", text)[0]], running))
            if predicate is None and re.match(r"(BRA|EXIT)\b(?!.*\bU?P\d)", text):
                break
            at += 1
    return sum(bool(PRODUCT.match(text)) for _, _, text in code)
