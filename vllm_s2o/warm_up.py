"""Before the first request: the kernels are compiled, and tried."""

import functools
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

from vllm_s2o.attention import DevicePlan, plan_step, run, stages, to_device
from vllm_s2o.config import S2OParams
from vllm_s2o.kernels import naive

OFF = 0.05
"""How far a row of one head may be off dense attention, relative to its size: some twenty times what rounding to
bfloat16 makes; caches in fp8 are widened, which is exact."""

MOVED = 0.1
"""How far keys may stand from where they should in a ranking, on average, as a share of it. Rounding puts some a class
further; by chance it would be a third."""


class WrongResult(RuntimeError):
    """Kernels that run, and compute something else than they should."""


class Trial(NamedTuple):
    """One prompt of random numbers, which the end of a step or all of it attends to."""

    query: torch.Tensor
    layouts: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values, the same in each."""
    block_table: torch.Tensor
    params: S2OParams
    num_rankings: int
    dtype: torch.dtype
    """Of the result."""

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def __str__(self) -> str:
        sizes = f"tile_size={self.params.tile_size} and key_block={self.params.key_block}"
        return f"head size {self.query.shape[2]} with {sizes}"


def make_trial(
    num_heads: int, cache_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, params: S2OParams,
    query_dtype: torch.dtype | None, cache_dtype: torch.dtype | None,
) -> Trial:  # fmt: skip
    """See `warm_up`."""
    block_size, num_kv_heads, head_size = cache_shape
    # No kernel depends on thresholds, of which a list counts the model's heads and not this rank's, nor on budgets or
    # the length of segments. At threshold 0 the result is that of dense attention.
    params = params.model_copy(update={"threshold": 0.0, "budget": None, "segment_len": params.tile_size})
    length = 3 * params.segment_len
    blocks = -(-length // block_size)
    chance = torch.Generator(device).manual_seed(0)  # vLLM samples with the others

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance, device=device)

    query = (2 * normal(length, num_heads, head_size)).to(query_dtype or dtype)
    block_table = torch.randperm(blocks, generator=chance, device=device, dtype=torch.int32)[None]
    # As vLLM's caches lie from 0.26 on. Before, heads lie a head's size apart: where that is no multiple of 16, Triton
    # compiles again.
    joined = normal(blocks, num_kv_heads, block_size, 2 * head_size).to(cache_dtype or dtype)
    keys, values = joined.transpose(1, 2).split(head_size, dim=-1)
    layouts = [(keys, values)]
    if head_size % 16:
        apart = torch.empty(blocks, 2, *cache_shape, dtype=joined.dtype, device=device)
        for half, whole in zip(apart.unbind(1), (keys, values), strict=True):
            half.copy_(whole)
        layouts.append((apart[:, 0], apart[:, 1]))
    return Trial(query, layouts, block_table, params, params.num_rankings(num_heads, num_kv_heads), dtype)


def check(trial: Trial, kernels: ModuleType | SimpleNamespace) -> None:
    """Run all kernels that steps need, but that for tiles with numbers that are not finite, which random ones have not.

    Raises:
        WrongResult: in a few words what is off.
    """
    length, device = len(trial.query), trial.query.device
    for query_len in (trial.params.segment_len, length):  # scores of one segment and of several are separate kernels
        plan = to_device(plan_step([query_len], [length], trial.params, trial.num_rankings), device)
        query = trial.query[length - query_len :]
        where = [torch.tensor(numbers, device=device) for numbers in ([0, query_len], [length])]
        exact = naive.dense_attention(query, *trial.layouts[0], trial.block_table, *where, trial.scale)
        for keys, values in trial.layouts:
            out = torch.full(query.shape, torch.nan, dtype=trial.dtype, device=device)
            run(query, keys, values, trial.block_table, plan, trial.params, trial.scale, out)
            off = ((out.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
            if not off <= OFF:
                raise WrongResult(f"{off:.0%} off dense attention in a trial of {length} tokens")
            check_rankings(trial, kernels, plan, query, keys)


def check_rankings(
    trial: Trial, kernels: ModuleType | SimpleNamespace, plan: DevicePlan, query: torch.Tensor, keys: torch.Tensor
) -> None:
    """What they are to the last key does not matter to the result above."""
    for tables in plan.waves:
        wave = tables.wave
        given = (query, keys, trial.block_table, tables.segments, wave.num_slots, trial.params.num_classes)
        ours = kernels.rank_keys(
            *given, max_history=wave.max_history, groups=tables.groups, num_rankings=trial.num_rankings
        )
        exact = naive.rank_keys(*given, num_rankings=trial.num_rankings)
        for segment in wave.segments:
            for number in range(trial.num_rankings if segment.history else 0):
                places = [naive.ranking_of(slots, list(segment), number).argsort() for slots in (ours, exact)]
                moved = (places[0] - places[1]).abs().float().mean().item() / segment.history
                if not moved <= MOVED:
                    raise WrongResult(f"ranking keys {moved:.0%} off in a trial of {len(trial.query)} tokens")


def why(error: Exception, trial: Trial) -> str | None:
    """What the log says of kernels that cannot be used; None where that is no reason to go on without them."""
    import triton
    from triton.runtime.errors import OutOfResources

    if isinstance(error, WrongResult):
        return f"{trial} is {error}: Triton {triton.__version__} or this GPU computes the kernels wrongly"
    if isinstance(error, OutOfResources):
        return f"{trial} needs {error.required} of {error.name}, this GPU has {error.limit}"
    return None


@functools.cache
def warm_up(
    num_heads: int, cache_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, params: S2OParams,
    query_dtype: torch.dtype | None = None, cache_dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    """Compile what the kernels need before the first request does, and try it on random numbers: compilers and GPUs
    that no test of ours has seen may make something else of it. Kernels in Gluon that fail give way to Triton's for all
    layers, if those do for all.

    Args:
        cache_shape: (block_size, num_kv_heads, head_size)
        query_dtype, cache_dtype: where they are not the model's `dtype`.

    Returns:
        Why the kernels cannot be used on this GPU, or None.
    Raises:
        Exception: what a compiler says of Triton's kernels, or CUDA of any, if that leaves nothing to go on with.
    """
    given = (num_heads, cache_shape, dtype, device, params, query_dtype, cache_dtype)
    trial = make_trial(*given)
    kernels = stages("auto", device)
    try:
        check(trial, kernels)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # after the latter nothing runs in this process
        raise
    except Exception as error:  # whatever a compiler says of kernels written for other versions of it
        if getattr(kernels, "uses_gluon", bool)():
            did = str(error) if isinstance(error, WrongResult) else f"not compiled ({type(error).__name__})"
            kernels.give_up(f"here they are {did}")
            # What was compiled before counted on the Gluon kernels too.
            warm_up.cache_clear()
            again, _warmed[:] = [*_warmed, given], []
            reasons = [warm_up(*one) for one in again]
            if not any(reasons):
                return None
            # Other layers have the kernels in Gluon already, or these have nothing better without: they stay.
            kernels.give_up(None)
            warm_up.cache_clear()
            _warmed[:] = again[:-1]
            return reasons[-1] or f"{trial}: the kernels in Gluon are {did}, and other layers cannot do without them"
        reason = why(error, trial)
        if reason is None:
            raise
        return reason
    _warmed.append(given)
    return None


_warmed: list[tuple] = []
"""What `warm_up` has compiled for."""
