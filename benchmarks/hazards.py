#!/usr/bin/env python3
"""What racecheck's hazards are, by the lines of source that they lie on: `hazards.py REPORT`.

Racecheck knows barriers of a whole block. It does not follow an order that one warp group hands to another by a barrier
in shared memory (mbarrier), of which a single thread arrives after the others of its group have met. Where such an
order is the kernel's own, its lines are named here with the barrier; every other hazard makes this program fail.
"""

import re
import sys
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
ORDERED = {
    ("RAW", "verdict.index(side + half).store(", "verdict.index(side"): "halves meet at `met` between the two",
    ("RAW", "def _attend(", "def _attend("): "Triton's own: what a block's warps shall do, before they begin",
    ("RAW", "if HALVES == 1:", "def _attend("): "Triton's own: what a block's warps are given, before they begin",
    ("RAW", "end_block.store(", "end_block.load("): "a hint, of use early or late: the ring of blocks is what orders",
    ("WAR", "end_block.load(", "end_block.store("): "a hint, of use early or late: the ring of blocks is what orders",
}
"""By kind, and parts of the lines that write and read: what orders two accesses that racecheck takes for a race."""
HAZARD = re.compile(
    r"(Error|Warning): Potential (\w+) hazard detected at __shared__ .*\n"
    r"=+\s+(?:Write|Read) Thread .* in (\S+?):(\d+)\n=+\s+(?:Write|Read) Thread .* in (\S+?):(\d+)"
)
RACE = re.compile(r"Race reported between \w+ access at \S+ in (\S+?):(\d+)\n((?:=+\s+and .*\n?)+)")
OTHER = re.compile(r"and \w+ access at \S+ in (\S+?):(\d+)")
"""Racecheck's own sums of hazards, each counted as one more: by a line, and those that it races with."""
SUMMARY = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")


def line(file: str, number: int) -> str:
    """Of a kernel's source; a function's decorator stands for its name."""
    path = KERNELS / Path(file).name
    lines = path.read_text().splitlines() if path.exists() else []
    found = lines[number - 1].strip() if number <= len(lines) else ""
    while found.startswith("@") and number < len(lines):
        number += 1
        found = lines[number - 1].strip()
    return found


def reason(kind: str, first: str, second: str) -> str | None:
    """What orders an access on one line and a later one on another."""
    return next(
        (why for (of, one, other), why in ORDERED.items() if of == kind and one in first and other in second), None
    )


def main() -> None:
    report = Path(sys.argv[1]).read_text(errors="replace")
    found = Counter(HAZARD.findall(report))
    unknown = 0
    for (level, kind, one, at, other, there), count in found.most_common():
        why = reason(kind, line(one, int(at)), line(other, int(there)))
        unknown += 0 if why else count
        places = f"{Path(one).name}:{at}, then {Path(other).name}:{there}"
        print(f"{count} x {kind} ({level.lower()}) at {places}: {why or 'UNKNOWN'}")
    said = sum(int(count) for counts in SUMMARY.findall(report) for count in counts)
    # A sum tells nothing of its own: but its lines must be those of hazards that were looked at.
    pairs = {frozenset([(one, at), (other, there)]) for _, _, one, at, other, there in found}
    sums = RACE.findall(report)
    for one, at, others in sums:
        strange = [place for place in OTHER.findall(others) if frozenset([(one, at), place]) not in pairs]
        unknown += len(strange)
        for other, there in strange:
            print(f"a race between {Path(one).name}:{at} and {Path(other).name}:{there}: UNKNOWN")
    missing = said - found.total() - len(sums)
    print(f"{said} hazards, {unknown} of them unknown, {missing} not shown")
    sys.exit(1 if unknown or missing or not said else 0)


if __name__ == "__main__":
    main()
