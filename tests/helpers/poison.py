"""Memory that was not written yet holds what would do most harm: places far outside, and numbers larger than any."""

from types import SimpleNamespace

import torch

from vllm_s2o.kernels import cpu, hopper, prefill, rank

NOTHING = 0x7F
"""Of each byte."""


def poison(monkeypatch) -> None:
    """All that the stages and their launchers allocate, from now on."""
    new_empty = torch.Tensor.new_empty

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).fill_(NOTHING)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: spoiled(new_empty(*args, **more)))
    with_poison = vars(torch) | {"empty": lambda *args, **more: spoiled(torch.empty(*args, **more))}
    for module in (cpu, hopper, prefill, rank):
        if hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", SimpleNamespace(**with_poison))
