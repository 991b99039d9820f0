"""Before the first request: the kernels are compiled, and tried."""

import functools

import torch

from vllm_s2o.attention import plan_step, run, stages, to_device
from vllm_s2o.config import S2OParams
from vllm_s2o.kernels import naive


class WrongResult(RuntimeError):
    """Kernels that run, and compute something else than attention."""


WRONG = {False: 0.02, True: 0.1}
"""How far a result may be off at start, relative to its size, where numbers have 16 bits or more, and (True) in fp8:
several times what rounding makes. A row of hundreds that is wrong, or a head, is more."""


@functools.cache
def warm_up(
    num_heads: int, cache_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, params: S2OParams,
    query_dtype: torch.dtype | None = None, cache_dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """Compile what the kernels need before the first request does, and try it: on random numbers, at threshold 0, they
    must give what dense attention gives. Compilers and GPUs that no test of ours has seen may make something else of
    them.

    Args:
        cache_shape: (block_size, num_kv_heads, head_size)
        query_dtype, cache_dtype: where they are not the model's `dtype`.

    Returns:
        Why the kernels cannot be used on this GPU, or None.
    """
    import triton
    from triton.runtime.errors import OutOfResources

    from vllm_s2o.kernels.common import FP8

    given = (num_heads, cache_shape, dtype, device, params, query_dtype, cache_dtype)
    block_size, num_kv_heads, head_size = cache_shape
    # No kernel depends on thresholds, of which a list counts the model's heads and not this rank's, nor on budgets or
    # the length of segments.
    params = params.model_copy(update={"threshold": 0.0, "budget": None, "segment_len": params.tile_size})
    num_rankings = params.num_rankings(num_heads, num_kv_heads)
    length = 3 * params.segment_len
    blocks = -(-length // block_size)
    chance = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance, device=device)

    query = (2 * normal(length, num_heads, head_size)).to(query_dtype or dtype)
    block_table = torch.randperm(blocks, generator=chance, device=device, dtype=torch.int32)[None]
    # As vLLM's caches lie from 0.26 on. Before, heads lie a head's size apart: where that is no multiple of 16, Triton
    # compiles again.
    joined = normal(blocks, num_kv_heads, block_size, 2 * head_size).to(cache_dtype or dtype)
    layouts = [joined.transpose(1, 2).split(head_size, dim=-1)]
    if head_size % 16:
        apart = normal(blocks, 2, *cache_shape).to(cache_dtype or dtype)
        layouts.append(apart.unbind(1))
    scale = head_size**-0.5

    def try_all() -> None:
        for query_len in (params.segment_len, length):  # scores of one segment and of several are separate kernels
            plan = to_device(plan_step([query_len], [length], params, num_rankings), device)
            last = query[length - query_len :]
            where = [torch.tensor(numbers, device=device) for numbers in ([0, query_len], [length])]
            for keys, values in layouts:
                out = torch.full(last.shape, torch.nan, dtype=dtype, device=device)
                run(last, keys, values, block_table, plan, params, scale, out)
                exact = naive.dense_attention(last, keys, values, block_table, *where, scale)
                error = ((out.float() - exact).norm() / exact.norm()).item()
                if not error <= WRONG[keys.dtype == FP8]:
                    raise WrongResult(f"{error:.0%} off dense attention in a test of {length} tokens")

    kernels = stages("auto", device)
    sizes = f"head size {head_size} with tile_size={params.tile_size} and key_block={params.key_block}"
    try:
        try_all()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler says of kernels written for other versions of it
        wrong = isinstance(error, WrongResult)
        if getattr(kernels, "uses_gluon", bool)():
            kernels.give_up(f"here they are {error}" if wrong else f"they do not compile here ({type(error).__name__})")
            # What was compiled before counted on the Gluon kernels too.
            warm_up.cache_clear()
            again, _warmed[:] = [*_warmed, given], []
            return [warm_up(*one) for one in again][-1]
        if wrong:
            return f"{sizes} is {error}: Triton {triton.__version__} or this GPU computes the kernels wrongly"
        if not isinstance(error, OutOfResources):
            raise
        return f"{sizes} needs {error.required} of {error.name}, this GPU has {error.limit}"
    _warmed.append(given)
    return None


_warmed: list[tuple] = []
"""What `warm_up` has compiled for."""
