"""Launch options that were measured: a file per GPU in `tuning/`, by kernel and head size.

A GPU without a file takes that of another with the same compute capability; what no file names, runs by the kernels'
own rules.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("tuning")


@functools.cache
def read_files() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))


def choose(kernel: str, head_size: int, gpu: str, capability: tuple[int, int]) -> dict[str, int]:
    """Options of a kernel, or none."""
    fitting = [file for file in read_files() if tuple(file["capability"]) == capability]
    fitting.sort(key=lambda file: file["gpu"] != gpu)
    return fitting[0].get(kernel, {}).get(str(head_size), {}) if fitting else {}


@functools.cache
def options(kernel: str, head_size: int, device: torch.device) -> dict[str, int]:
    """`choose` for a device; none without a GPU."""
    if device.type != "cuda":
        return {}
    return choose(kernel, head_size, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
