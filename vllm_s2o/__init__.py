"""S2O sparse prefill attention, and the vLLM backend that serves it.

The public names are loaded when they are first used: vLLM imports this package in each of its
processes to find the plugin, and that must cost no CUDA context and no kernel.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_s2o.version import __version__

if TYPE_CHECKING:
    from vllm_s2o.attention import Stats, prefill_attention
    from vllm_s2o.config import ConfigError, S2OParams

__all__ = ["ConfigError", "S2OParams", "Stats", "__version__", "prefill_attention"]

# In a checkout, kernels/ and configs/ stand beside this package; an installed wheel has them inside it.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

_HOME = {
    "ConfigError": "vllm_s2o.config",
    "S2OParams": "vllm_s2o.config",
    "Stats": "vllm_s2o.attention",
    "prefill_attention": "vllm_s2o.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_s2o' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
