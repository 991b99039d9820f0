"""Tables of numbers on the device, and how segments are grouped for scoring. No Triton here."""

from collections.abc import Sequence

import torch

from .naive import SAMPLE_EVERY

MAX_SCORED_TOGETHER = 64
"""Rankings of the same keys whose mean queries form one matrix operand, and the most segments of a group."""
SORT_BLOCK = 512
"""Keys counted together, and placed together by one warp; below 2^16, which is what a running count may reach."""
SPREAD_KEYS = 1024
"""Sampled keys that one program takes: their partial moments are combined by whoever needs them."""


def table_words(num_segments: int, num_rankings: int, keys: int, head_size: int, num_classes: int) -> int:
    """Words of 32 bits that a ranking's tables take beside slots and classes: means, variances, moments, counts.

    Args:
        keys: segments times rankings times the longest history, or what bounds that.
    """
    pairs = num_segments * num_rankings
    moments = 3 * (keys // (SPREAD_KEYS * SAMPLE_EVERY) + pairs)
    return 2 * pairs * head_size + moments + num_classes * (keys // SORT_BLOCK + pairs)


def as_table(rows, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Numbers, or tuples of them, as a tensor on the device, copied without waiting for it."""
    table = torch.tensor(rows, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def score_groups(segments: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Runs (first, count) of segments of one sequence; column 0 of a segment names the sequence."""
    groups: list[tuple[int, int]] = []
    for index, segment in enumerate(segments):
        if groups:
            first, count = groups[-1]
            if count < MAX_SCORED_TOGETHER and segments[first][0] == segment[0]:
                groups[-1] = (first, count + 1)
                continue
        groups.append((index, 1))
    return groups
