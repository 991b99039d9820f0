"""Barriers in the shared memory of a compiled kernel."""

import re


def check_barriers(ptx: str) -> None:
    """Nothing else may use the eight bytes of a barrier in shared memory, even if nobody waits for it: where processes
    share the GPU, what a kernel writes there may come back changed (`benchmarks/lab.md`).

    Addresses are told apart by the constants in them. What a thread adds to one is not known: then only the beginning
    of a barrier is looked for, since an index may have a constant of its own.
    """
    constants = {name: int(at) for name, at in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    constants["global_smem"] = 0

    def places(pattern: str) -> set[tuple[bool, int]]:
        """Whether all of an address is known, and its constant."""
        found = re.findall(pattern + r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]", ptx)
        return {(name in constants, constants.get(name, 0) + int(more or 0)) for name, more in found}

    barriers = {at for _, at in places(r"mbarrier\.init\.shared::cta\.b64 ")}
    used = places(r"(?:st|ld)\.shared\S*\s[^\[\n]*")
    if "mbarrier" in ptx and not (barriers and used):
        raise SystemExit("no barrier was found, or nothing else in shared memory: is PTX written otherwise now?")
    if both := sorted({at for known, at in used for one in barriers if one <= at < one + (8 if known else 1)}):
        raise SystemExit(f"barriers share their memory at {both}")
