"""Whether a kernel, as compiled, reads a register that nothing wrote before.

ptxas 12.8, which Triton 3.6 has, compiled S2O's Triton kernel so for heads of 32, tiles of 64 rows and blocks of 64
keys where the numbers of a key lie apart: it took the address of the values for a product from a register that nothing
had written. Such a product takes its values from wherever that points: results are wrong, or the process ends with an
illegal memory access (`benchmarks/lab.md`).
"""

import re
from collections import deque

from machine_code import Code, Instruction, Meeting

REGISTER = re.compile(r"(?<![A-Z0-9_])(U?R)(\d+)(\.64)?")
DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
WRITES_NOTHING = re.compile(
    r"ST|RED(?!UX)|BAR|BRA|EXIT|WARP|DEPBAR|FENCE|NOP|BSSY|BSYNC|BREAK|ERRBAR|CCTL|MEMBAR|YIELD|NANOSLEEP|UTMA|LDGDEPBAR|"
    r"LDGSTS|UBLK|ACQBULK|KILL|BPT|USETMAXREG|\w+SETP|FCHK|R2P"
)
"""But predicates, which are not followed."""
COPY = re.compile(r"U?MOV|R2UR|STL|(?=IMAD\.(?:MOV\.)?U32 \w+, RZ, RZ,)IMAD|(?=UIMAD\.U32 \w+, URZ, URZ,)UIMAD")
"""What moves a register, or spills it: whatever it holds, if that is not used."""
HALVES = re.compile(r"PRMT|LOP3\.LUT (R\d+), \1, 0x[f7bde]{8}, RZ, 0xc0\b")
"""What keeps a part of a register that may hold nothing: a half, or all bits but one, where predicates are kept."""

UNIFORM = 512
"""Where the bits of uniform registers begin: of others there are 255, and a wide one may be believed to go beyond."""

Name = tuple[str, int]


def _widest(operation: str) -> int:
    """How many registers an instruction may write, rather too many."""
    if re.search(r"128|LDSM|HMMA|IMMA|DMMA", operation):
        return 4
    return 2 if re.search(r"64|WIDE|CS2R(?!\.32)|^D(ADD|MUL|FMA)", operation) else 1


def _names(text: str, width: int = 1) -> set[Name]:
    return {
        (kind, int(number) + more)
        for kind, number, pair in REGISTER.findall(text)
        for more in range(max(width, 2 if pair else 1))
    }


def _bits(names: set[Name]) -> int:
    return sum(1 << number + (UNIFORM if kind == "UR" else 0) for kind, number in names)


def _named(bits: int) -> list[str]:
    places = [place for place in range(bits.bit_length()) if bits >> place & 1]
    return [f"UR{place - UNIFORM}" if place >= UNIFORM else f"R{place}" for place in places]


def effects(one: Instruction) -> tuple[set[Name], set[Name]]:
    """Registers that an instruction writes and reads: rather too many written, and too few read."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", one.operands) if part.strip()]
    if product := re.match(r"\w*GMMA\.64x(\d+)x", one.operation):
        into, left = int(parts[0][1:]), re.fullmatch(r"R\d+", parts[1])
        first = int(DESCRIPTOR.search(one.operands)[1])
        # Two words of each operand that lies in shared memory; the right one's are the third and the fourth.
        read = {("UR", first + word) for word in (range(2, 4) if left else range(4))}
        read |= _names(parts[1], 4) if left else set()
        return {("R", into + more) for more in range(int(product[1]) // 2)}, read
    written: set[Name] = set()
    if not WRITES_NOTHING.match(one.operation):
        while parts and re.fullmatch(r"U?P[\dTR]", parts[0]):
            parts.pop(0)
        if parts and "[" not in parts[0]:
            written = _names(parts.pop(0), _widest(one.operation))
    return written, _names(" ".join(parts))


def check_unwritten_registers(sass: str) -> int:
    """Follow every path through a kernel.

    Returns: how many registers it has written at most.
    Raises:
        SystemExit: on one of them an instruction reads a register that nothing wrote.
    """
    code = Code.read(sass)
    done = [tuple(map(_bits, effects(one))) for one in code.instructions]
    # Written on every path to a place, for each way that threads may meet.
    state: dict[tuple[int, Meeting], int] = {}
    places = deque([(0, (), 0)] if code.instructions else [])
    while places:
        at, meeting, before = places.popleft()
        if (at, meeting) in state:
            before &= state[at, meeting]
            if before == state[at, meeting]:
                continue
        state[at, meeting] = before
        written, read = done[at]
        unknown = COPY.match(code.instructions[at].text) and read & ~before
        after = before & ~written if unknown else before | written
        places += [(goal, met, after) for goal, met in code.after(at, meeting)]
    everywhere: dict[int, int] = {}
    for (at, _), before in state.items():
        everywhere[at] = everywhere.get(at, before) & before
    for at, before in sorted(everywhere.items()):
        one = code.instructions[at]
        missing = done[at][1] & ~before
        if HALVES.match(one.text):
            missing &= ~done[at][0]  # of what it writes itself
        if missing and not COPY.match(one.text):
            names = " and ".join(_named(missing))
            raise SystemExit(f"at {one.address}, {one.text} reads {names}, which nothing wrote before")
    return max((before.bit_count() for before in everywhere.values()), default=0)
