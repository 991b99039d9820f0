"""Problems of any kind for the Triton kernels in the interpreter, with every tensor between pages that nobody may
touch: a kernel that reads or writes beside one ends this process.

python guarded.py EXAMPLES SEED [beside]

What a kernel reads of a workspace before it is written leads outside as well. Each problem is computed twice, with
tensors that begin where a page begins, and with ones that end where a page ends (up to 16 bytes, to which kernels are
told that addresses are aligned). With `beside` a kernel reads beside a tensor, to show that it is seen.
"""

import ctypes
import itertools
import math
import mmap
import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, seed, settings
from poison import NOTHING
from problems import problems

from vllm_s2o import prefill_attention
from vllm_s2o.kernels import prefill, rank, tables

PAGE = mmap.PAGESIZE
ALIGNED = 16
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory for tensors."""

    def __init__(self, at_end: bool):
        self.at_end = at_end

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count], uninitialised."""
        size = max(count, 1) * dtype.itemsize
        inside = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, inside + 2 * PAGE)
        begin = (inside - size) // ALIGNED * ALIGNED if self.at_end else 0
        memory[PAGE:-PAGE] = bytes([NOTHING]) * inside
        tensor = torch.frombuffer(memory, dtype=dtype, count=max(count, 1), offset=PAGE + begin)
        address = tensor.data_ptr() - begin
        for beside in (address - PAGE, address + inside):
            assert libc.mprotect(beside, PAGE, 0) == 0, os.strerror(ctypes.get_errno())
        return tensor[:count]

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, by the same strides, with what lies between them."""
        if not tensor.numel():
            return tensor
        spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        memory = self.take(sum(spans) + 1, tensor.dtype)
        memory.copy_(tensor.as_strided(memory.shape, (1,)))
        return memory.as_strided(tensor.shape, tensor.stride())

    def empty(self, *shape, dtype=torch.float32, device=None) -> torch.Tensor:
        """As `torch.empty`."""
        sizes = shape if not shape or isinstance(shape[0], int) else shape[0]
        return self.take(math.prod(sizes), dtype).view(sizes)

    def use(self) -> None:
        """For all that the kernels' launchers allocate."""
        for module in (rank, prefill):
            module.torch = SimpleNamespace(**vars(torch) | {"empty": self.empty})
        torch.Tensor.new_empty = lambda like, *shape, dtype=None, device=None: self.empty(
            *shape, dtype=dtype or like.dtype
        )
        tables.as_table = lambda rows, device, dtype=torch.int32: self.copy(torch.tensor(rows, dtype=dtype))


@triton.jit
def look(Tensor, at):
    tl.store(Tensor, tl.load(Tensor + at))


def check(examples: int, number: int) -> int:
    """How many problems were computed."""
    counted = itertools.count()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(problems((torch.float32, torch.float16), most=200, small=True))
    def compute(problem):
        for at_end in (False, True):
            memory = Guarded(at_end)
            memory.use()
            arguments = {
                name: memory.copy(value) if isinstance(value, torch.Tensor) else value
                for name, value in problem.arguments.items()
            }
            prefill_attention(**arguments, out=memory.copy(problem.out), implementation="triton")
        next(counted)

    compute()
    return next(counted)


def main() -> None:
    examples, number, *more = sys.argv[1:]
    if more == ["beside"]:
        tensor = Guarded(at_end=True).take(ALIGNED, torch.int8)
        look[(1,)](tensor, ALIGNED - 1)
        print("within", flush=True)
        look[(1,)](tensor, ALIGNED)
    print(check(int(examples), int(number)), "problems")


if __name__ == "__main__":
    main()
