"""How vLLM's caches of keys and values lie in memory, and what their numbers stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cuda_caches(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [num_blocks, block_size, num_kv_heads, head_size] views of FLASH_ATTN's cache."""
    if kv_cache.dim() == 5:  # [blocks, 2, block_size, kv_heads, head_size], to 0.25
        key, value = kv_cache.unbind(1)
    else:  # [blocks, kv_heads, block_size, 2 * head_size]
        key, value = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return key, value


def _split_cpu(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """K and V of CPU_ATTN's cache, each [blocks, kv_heads, block_size * head_size] as the kernels store it."""
    blocks, heads, block_size, both = kv_cache.shape
    flat = kv_cache.view(blocks, heads, 2, block_size * both // 2)
    return flat[:, :, 0], flat[:, :, 1], block_size, both // 2


def _plain_cpu(kv_cache: torch.Tensor, block_table: torch.Tensor):
    """`vec`, `vec16`: a page of K is [head_size, block_size], one of V [block_size, head_size]; strides name both."""
    key, value, block_size, head_size = _split_cpu(kv_cache)
    key = key.unflatten(-1, (head_size, block_size)).permute(0, 3, 1, 2)
    value = value.unflatten(-1, (block_size, head_size)).transpose(1, 2)
    return key, value, block_table


def _amx_cpu(kv_cache: torch.Tensor, block_table: torch.Tensor):
    """`amx`: pairs of values lie side by side for the tile units, K as [block_size / 16, head_size / 2, 16, 2], V as
    [head_size / 16, block_size / 2, 16, 2]. No strides name that: the pages in use are unpacked and renumbered."""
    num_blocks = kv_cache.shape[0]
    # A table may hold garbage beyond a sequence's end: whatever it names is unpacked, but it must exist.
    used, renumbered = block_table.clamp(0, num_blocks - 1).unique(return_inverse=True)
    key, value, block_size, head_size = _split_cpu(kv_cache)
    key = key[used.long()].unflatten(-1, (block_size // 16, head_size // 2, 16, 2))
    value = value[used.long()].unflatten(-1, (head_size // 16, block_size // 2, 16, 2))
    shape = (len(used), key.shape[1], block_size, head_size)
    key = key.transpose(3, 4).reshape(shape)  # token groups, tokens, pairs, 2
    value = value.permute(0, 1, 3, 5, 2, 4).reshape(shape)  # token pairs, 2, column groups, columns
    return key.transpose(1, 2), value.transpose(1, 2), renumbered.int()


CPU_LAYOUTS = {"vec": _plain_cpu, "vec16": _plain_cpu, "amx": _amx_cpu}
"""By the instruction set that packs the cache. `amx` holds for 16-bit types, the only ones vLLM uses it for."""


def views(layer, impl, kv_cache: torch.Tensor, block_table: torch.Tensor):
    """(key_cache, value_cache, block_table) for `attention.run`."""
    if kv_cache.is_cuda:
        if (stored := kernel_dtypes(impl)[1]) is not None:  # vLLM keeps bytes
            kv_cache = kv_cache.view(stored)
        return *cuda_caches(kv_cache, impl.head_size), block_table
    return CPU_LAYOUTS[getattr(layer, "isa", None) or impl.isa](kv_cache, block_table)


# -- in fp8 ------------------------------------------------------------------------------------------------------------

FP8_CACHES = ("fp8", "fp8_e4m3")
"""What `--kv-cache-dtype` calls the one that can be read."""


def quantised(impl, layer) -> str | None:
    """Why a layer's quantised cache cannot be read, or None."""
    from vllm.platforms import current_platform

    if impl.kv_cache_dtype not in FP8_CACHES:
        return impl.kv_cache_dtype
    if not current_platform.is_cuda():  # CPU_ATTN packs such pages in ways of its own
        return f"{impl.kv_cache_dtype} on a CPU"
    if not current_platform.has_device_capability(89):
        return f"{impl.kv_cache_dtype} on a GPU without fp8"
    if any(getattr(layer, name).numel() > 1 for name in ("_q_scale", "_k_scale", "_v_scale")):
        return f"{impl.kv_cache_dtype} with a scale per head"
    return None


def kernel_dtypes(impl) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Types of queries and caches where they are not the model's."""
    import torch

    if impl.kv_cache_dtype not in FP8_CACHES:
        return None, None
    # vLLM quantises queries before an implementation that says so.
    return torch.float8_e4m3fn if getattr(impl, "supports_quant_query_input", False) else None, torch.float8_e4m3fn


def scales(impl, layer, query: torch.Tensor) -> tuple[float, float]:
    """Factors on the logits and on the result, of a quantised cache."""
    if impl.kv_cache_dtype not in FP8_CACHES:
        return 1.0, 1.0
    of_query = layer._q_scale_float if query.element_size() == 1 else 1.0
    return of_query * layer._k_scale_float, layer._v_scale_float
