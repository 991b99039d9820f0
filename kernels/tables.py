"""Tables of numbers on the device, and how segments are grouped for scoring. No Triton here."""

from collections.abc import Sequence

import torch

MAX_SCORED_TOGETHER = 64
"""Segments whose mean queries form one matrix operand."""


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
