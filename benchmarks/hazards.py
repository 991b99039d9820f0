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
    ("hopper.py", "verdict.index("): "halves meet at `met` between the two",
    ("hopper.py", "def _attend("): "Triton's own: what a block's warps shall do, before they begin",
}
"""By file and a part of the line: what orders accesses there that racecheck takes for a race."""
HAZARD = re.compile(
    r"Potential (\w+) hazard detected at __shared__ .*\n"
    r"=+\s+(Write|Read) Thread .* in (\S+?):(\d+)\n=+\s+(Write|Read) Thread .* in (\S+?):(\d+)"
)


def line(file: str, number: int) -> str:
    """Of a kernel's source; a function's decorator stands for its name."""
    path = KERNELS / Path(file).name
    lines = path.read_text().splitlines() if path.exists() else []
    found = lines[number - 1].strip() if number <= len(lines) else ""
    while found.startswith("@") and number < len(lines):
        number += 1
        found = lines[number - 1].strip()
    return found


def reason(file: str, number: int) -> str | None:
    return next(
        (why for (name, part), why in ORDERED.items() if Path(file).name == name and part in line(file, number)), None
    )


def main() -> None:
    report = Path(sys.argv[1]).read_text(errors="replace")
    found = Counter(
        (kind, first, Path(one).name, int(at), second, Path(other).name, int(there))
        for kind, first, one, at, second, other, there in HAZARD.findall(report)
    )
    counted = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?", report)
    said = int(counted[1]) if counted else 0
    new = said - found.total()
    for (kind, first, one, at, second, other, there), count in found.most_common():
        why = reason(one, at)
        known = why is not None and why == reason(other, there)
        new += 0 if known else count
        places = f"{first.lower()} at {one}:{at}, {second.lower()} at {other}:{there}"
        print(f"{count} x {kind}: {places}: {why if known else 'UNKNOWN'}")
    print(f"{said} hazards, {new} of them unknown")
    sys.exit(1 if new or not said else 0)


if __name__ == "__main__":
    main()
