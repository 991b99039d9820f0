"""A compiled kernel's machine code (SASS), instruction by instruction, and the paths through it."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*(\S+)\s*(.*?)\s*;")
_LABELLED = re.compile(r"\.L_x_\d+")

Meeting = tuple[tuple[str, int], ...]
"""Where the threads of each barrier meet."""


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    address: str
    predicate: str | None
    operation: str
    operands: str

    @property
    def text(self) -> str:
        return f"{self.operation} {self.operands}"


@dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def read(cls, sass: str) -> "Code":
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(instructions)
            elif found := _INSTRUCTION.match(line):
                instructions.append(Instruction(found[1], found[2], found[3], found[4]))
        return cls(instructions, labels)

    def after(self, at: int, meeting: Meeting) -> Iterator[tuple[int, Meeting]]:
        """Where threads may go on after an instruction, the next one first; nowhere at the end."""
        text, predicate = self.instructions[at].text, self.instructions[at].predicate
        goal = self.labels[_LABELLED.search(text)[0]] if re.match("BRA|BSSY", text) else None
        if text.startswith("BSSY"):
            barrier = text.split()[1].strip(",")
            meeting = (*(other for other in meeting if other[0] != barrier), (barrier, goal))
        elif text.startswith("BSYNC"):
            goal = dict(meeting)[text.split()[1]]
        leaves = predicate is None and re.match(r"(BRA(?!\.DIV)|EXIT|BSYNC)\b(?!.*\bU?P\d)", text)
        if not leaves and at + 1 < len(self.instructions):
            yield at + 1, meeting
        if text.startswith(("BRA", "BSYNC")) and goal < len(self.instructions):
            yield goal, meeting
