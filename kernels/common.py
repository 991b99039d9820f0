"""What the Triton files share."""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def split_slot(slot, PAGE: tl.constexpr):
    """Page and place in the page; 64-bit, because a cache may hold more than 2^31 elements."""
    return (slot // PAGE).to(tl.int64), slot % PAGE


def block_dim(head_size: int) -> int:
    """Head sizes that are no power of two are padded to the next one and masked."""
    return max(16, triton.next_power_of_2(head_size))


FP8 = torch.float8_e4m3fn
"""What a quantised cache holds, and queries beside it."""


def short(device: torch.device) -> torch.dtype:
    """bfloat16, for products in the tensor cores. On a CPU, where Triton's interpreter runs the kernels, it is float32:
    the interpreter multiplies bfloat16 as the whole numbers of its bits."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The type that products take a tensor's numbers in: fp8 is widened, which is exact."""
    return short(tensor.device) if tensor.dtype == FP8 else tensor.dtype


def dot_precision(tensor: torch.Tensor) -> str:
    """fp32 inputs are multiplied as such: Triton's default would round them to tf32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may take; 0 without a GPU, where it does not matter."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
