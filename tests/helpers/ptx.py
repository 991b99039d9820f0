"""The few instructions of PTX that `vote.py` uses, executed for the 32 threads of a warp at once."""

import re

import numpy as np

LANES = np.arange(32, dtype=np.uint64)
WORD = np.uint64(2**32 - 1)


class Warp:
    """Args:
    operands: the assembly's `$0`, `$1`, ...: an array [32] each, uint64; results are written there.
    memory: global memory, a word per address.
    """

    def __init__(self, operands: list[np.ndarray], memory: dict[int, int]):
        self.operands, self.memory, self.shared = operands, memory, {}
        self.registers = {"%laneid": LANES.copy(), "%lanemask_lt": (np.uint64(1) << LANES) - np.uint64(1)}
        self.registers["sorted"] = np.zeros(32, np.uint64)  # the address of the array in shared memory

    def run(self, assembly: str) -> None:
        for line in assembly.splitlines():
            line = line.strip().rstrip(";")
            if line and line not in "{}" and not line.startswith((".reg", ".shared")):
                self.step(line)

    def get(self, name: str) -> np.ndarray:
        name = name.strip()
        if name.startswith("$"):
            return self.operands[int(name[1:])]
        return self.registers[name] if name in self.registers else np.full(32, int(name, 0), np.uint64)

    def put(self, name: str, value, where=None) -> None:
        value = np.asarray(value, np.uint64)
        if name != "at":  # the only register of 64 bits
            value = value & WORD
        there = self.operands if name.startswith("$") else self.registers
        key = int(name[1:]) if name.startswith("$") else name
        there[key] = value if where is None else np.where(where, value, there[key])

    def step(self, line: str) -> None:
        where = None
        if line.startswith("@p "):
            where, line = self.registers["p"].astype(bool), line[3:]
        op, _, rest = line.partition(" ")
        kind = op.split(".")[0]
        if op == "st.shared.v2.b32":
            address, first, second = re.fullmatch(r"\[(\w+)\], \{(.+), (.+)\}", rest).groups()
            for lane, at in enumerate(self.get(address)):
                assert at not in self.shared, "two threads write to one place"
                self.shared[int(at)] = (self.get(first)[lane], self.get(second)[lane])
            return
        if op == "ld.shared.v2.b32":
            first, second, address, offset = re.fullmatch(r"\{(.+), (.+)\}, \[(\w+)\+(\d+)\]", rest).groups()
            pairs = [self.shared[int(at) + int(offset)] for at in self.get(address)]
            self.put(first, [pair[0] for pair in pairs])
            self.put(second, [pair[1] for pair in pairs])
            return
        args = [part.strip() for part in rest.split(",")]
        value = [self.get(arg) for arg in args[1:] if arg and not arg.startswith("[")]
        match kind:
            case "mov":
                self.put(args[0], value[0], where)
            case "bfe":
                self.put(args[0], value[0] >> value[1] & ((np.uint64(1) << value[2]) - np.uint64(1)))
            case "add":
                self.put(args[0], value[0] + value[1], where)
            case "sub":
                self.put(args[0], value[0] - value[1], where)
            case "mad":
                self.put(args[0], value[0] * value[1] + value[2])
            case "and":
                self.put(args[0], value[0] & value[1])
            case "xor":
                self.put(args[0], value[0] ^ value[1])
            case "lop3":
                assert args[4] == "0x60", "a & (b ^ c)"
                self.put(args[0], value[0] & (value[1] ^ value[2]))
            case "popc":
                self.put(args[0], [int(bits).bit_count() for bits in value[0]])
            case "setp":
                equal = value[0] == value[1]
                self.registers["p"] = (equal if ".eq." in op else ~equal).astype(np.uint64)
            case "vote":
                bits = sum(int(bit) << lane for lane, bit in enumerate(self.registers["p"]))
                self.put(args[0], np.full(32, bits, np.uint64))
            case "shfl" if ".idx." in op:
                self.put(args[0], value[0][(value[1] & np.uint64(31)).astype(int)])
            case "shfl":
                name, predicate = args[0].split("|")
                source = np.maximum(LANES.astype(int) - int(args[2]), LANES.astype(int) * (int(args[2]) > LANES))
                self.put(name, value[0][source])
                self.registers[predicate] = (int(args[2]) <= LANES).astype(np.uint64)
            case "ld":
                self.put(args[0], [self.memory[int(at)] for at in self.registers["at"]])
            case "st":
                for lane, at in enumerate(self.registers["at"]):
                    self.memory[int(at)] = int(value[0][lane])
            case "bar":
                pass
            case _:
                raise NotImplementedError(line)
