"""The stages on an NVIDIA GPU: for each, the fastest kernel that takes the problem.

The Triton kernels of `rank.py` and `prefill.py` take every problem. Those written in Gluon, Triton's lower level, take
most on the GPUs that they are made for, and give the same ranking and the same stops.
"""

from types import ModuleType

import torch
import triton

from . import prefill, rank

_missing: str | None
try:
    from . import hopper, vote
except (ImportError, AttributeError) as error:  # Gluon's names move between versions of Triton
    hopper = vote = None  # type: ignore[assignment]  # asked for only where nothing is missing
    _missing = f"Triton {triton.__version__} has another Gluon ({error})"
else:
    _missing = None

__all__ = ["attend", "describe", "give_up", "rank_keys", "uses_gluon"]


def give_up(reason: str | None) -> None:
    """Use the Triton kernels alone from now on: what to do when a compiler rejects the others, or makes something else
    of them. None takes it back."""
    global _missing
    _missing = reason


def uses_gluon() -> bool:
    return _missing is None


def describe(
    device: torch.device,
    dtype: torch.dtype,
    num_kv_heads: int,
    head_size: int,
    params,
    cache: torch.dtype | None = None,
) -> str:
    """Which kernels take a model's layers, for the log; `params` are an `S2OParams`, `cache` the caches' type if it is
    another one."""
    if _missing is not None:
        return f"Triton kernels, without those in Gluon: {_missing}"
    # Tensors of the model's kind, as small as they can be: the choice looks at nothing else of a problem.
    query = torch.empty(1, num_kv_heads, head_size, dtype=dtype, device=device)
    keys = torch.empty(1, 16, num_kv_heads, head_size, dtype=cache or dtype, device=device)
    why = hopper.unsuitable(query, keys, keys, params.tile_size, params.key_block * params.stop_interval)
    attention = "in Gluon" if why is None else f"in Triton ({why})"
    ranking = "in Gluon" if params.num_classes == vote.CLASSES else f"in Triton (num_classes={params.num_classes})"
    return f"attention {attention}, ranking {ranking}"


def rank_keys(query, key_cache, block_table, segments, num_slots: int, num_classes: int, **sizes) -> torch.Tensor:
    """`rank.rank_keys`."""
    if uses_gluon() and num_classes == vote.CLASSES:
        sizes |= dict(count_keys=vote.count, place_keys=vote.place)
    return rank.rank_keys(query, key_cache, block_table, segments, num_slots, num_classes, **sizes)


def attend(query, key_cache, value_cache, block_table, segments, tiles, slots, *args, **rules) -> torch.Tensor:
    """`prefill.attend`."""
    kernel: ModuleType = prefill
    interval = rules["key_block"] * rules["stop_interval"]
    problem = (query, key_cache, value_cache, rules["tile_size"], interval)
    if uses_gluon() and hopper.unsuitable(*problem) is None:
        kernel = hopper
    return kernel.attend(query, key_cache, value_cache, block_table, segments, tiles, slots, *args, **rules)
